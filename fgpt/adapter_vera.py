"""VeRA: all layers share one random A and one random B, which stay; each trains two vectors.

W' = W + diag(b) · B · diag(d) · A
"""

from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.adapter_defaults import TARGET
from fgpt.adapter_types import Adapters
from fgpt.errors import InputError
from fgpt.layers import weight_matrices
from fgpt.rng import fold_in
from fgpt.tree import device, node, replace_at, select
from fgpt.weights import Adapted, shape

T = TypeVar("T")

D_INITIAL = 0.1
"""What d begins as, in PEFT and in the paper's experiments."""


@node
class VeRA:
    """W' = W + diag(b) · B · diag(d) · A, with the A and B that `vera` has put into the params.

    Args:
        d: The factor of each component between A and B. `vera` sets it to 0.1.
        b: The factor of each output. `vera` sets it to 0.

    Source: Kopiczko et al. 2024 (VeRA), equation 2.

    >>> import fgpt
    >>> w = fgpt.Adapted(torch.eye(2), a=torch.ones(1, 2), b=torch.ones(2, 1), scale=0.0)
    >>> x = VeRA(d=torch.tensor([0.5]), b=torch.tensor([2.0, 4.0]))
    >>> fgpt.dense(fgpt.adapt({"layer": fgpt.model.Linear(w)}, {"layer": x})["layer"].w)
    tensor([[2., 1.],
            [2., 3.]])
    """

    d: Float[Tensor, " rank"]
    b: Float[Tensor, " out"]

    def adapt_layer(self, layer: Any, path: str, seed: Int[Tensor, ""] | None) -> Any:
        """W' = W + diag(b) · B · diag(d) · A. There is no dropout: nothing reads `seed`."""
        w = layer.w
        if not isinstance(w, Adapted) or w.a is None or w.b is None:
            raise InputError(f"VeRA at {path}: the base has no A and B there; adapt the params that vera has returned")
        if (len(self.d), len(self.b)) != (len(w.a), len(w.b)):
            raise InputError(
                f"VeRA at {path} is for rank {len(self.d)} and {len(self.b)} outputs, but the base has rank {len(w.a)} "
                f"and {len(w.b)} outputs"
            )
        return replace(layer, w=replace(w, a=self.d[:, None] * w.a, b=self.b[:, None] * w.b, scale=1.0))


def vera(params: T, rng: torch.Generator, rank: int = 256, target: str = TARGET) -> tuple[T, Adapters]:
    r"""Params with a frozen random A and B, and a fresh VeRA on every layer whose path matches `target`. b = 0, so it
    begins as the identity. A layer of [out, in] has the first `in` columns of A and the first `out` rows of B, which
    are uniform as PEFT draws them.

    The params are equal for equal keys: keep the key and the vectors, and draw A and B again.

    Args:
        params: The base, quantized or not.
        rng: A key: A is drawn from fold_in(rng, "a"), B from fold_in(rng, "b").
        rank: Rows of A and columns of B. It may exceed the layers' sides.
        target: A regular expression that matches a layer's path in full.

    Returns:
        The params with A and B, which mean what they meant, and the vectors.

    Raises:
        InputError: if `target` matches nothing, or the rank is not positive.

    Source: Kopiczko et al. 2024 (VeRA), section 3.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=2, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> base = fgpt.init(cfg, fgpt.key(0))
    >>> params, adapters = fgpt.vera(base, fgpt.key(1), rank=64, target=r".*\.(q|v)")
    >>> fgpt.num_trainable(adapters)  # 64 + 8 for each of four layers
    288
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> torch.equal(fgpt.functional_call(fgpt.apply, (params, adapters), tokens), fgpt.apply(base, tokens))
    True
    """
    if rank < 1:
        raise InputError(f"rank is {rank}: expected 1 or more")
    weights = weight_matrices(params)
    paths = select(weights, target)
    outs, ins = zip(*(shape(weights[path]) for path in paths), strict=True)
    where = device({path: weights[path] for path in paths})
    a = _kaiming_uniform(rank, max(ins), fold_in(rng, "a")).to(where)
    b = _kaiming_uniform(max(outs), rank, fold_in(rng, "b")).to(where)
    frozen: dict[str, Adapted] = {}
    adapters: Adapters = {}
    for path, out, inp in zip(paths, outs, ins, strict=True):
        frozen[f"{path}.w"] = Adapted(weights[path], a[:, :inp], b[:out], scale=0.0)
        adapters[path] = VeRA(torch.full((rank,), D_INITIAL, device=where), torch.zeros(out, device=where))
    return replace_at(params, frozen), adapters


def _kaiming_uniform(rows: int, columns: int, rng: torch.Generator) -> Float[Tensor, "rows columns"]:
    """Uniform in ±√(6 / columns)."""
    bound = (6 / columns) ** 0.5
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=rng)
