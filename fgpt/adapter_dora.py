"""DoRA, a LoRA whose rows have a trained magnitude:

W' = m · V / ‖V‖ by row        V = W + s·B·A
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.adapter_defaults import RANK, TARGET
from fgpt.adapter_lora import LoRA, lora, scaled_b
from fgpt.adapter_types import Adapters
from fgpt.errors import InputError
from fgpt.layers import weight_matrices
from fgpt.tree import node, tree_map
from fgpt.weights import Weight, row_norms, shape


@node
class DoRA:
    """W' = m · V / ‖V‖ by row, with V = W + s·B·A: magnitude m, direction V. The gradient takes ‖V‖ as a constant.

    Args:
        lora: The update of the direction.
        m: The magnitude of each row, that is of each output. `dora` sets it to ‖W‖ by row.
        norms: ‖V‖ by row, if it is known already (see `with_norms`); never trained or saved. None computes it.

    Source: Liu et al. 2024 (DoRA), sections 4.1 and 4.3.

    >>> import fgpt
    >>> base = {"layer": fgpt.model.Linear(torch.eye(2))}
    >>> update = fgpt.LoRA(torch.ones(1, 2), torch.zeros(2, 1), alpha=1.0)
    >>> adapted = fgpt.adapt(base, {"layer": fgpt.DoRA(update, m=torch.tensor([3.0, 5.0]))})
    >>> fgpt.dense(adapted["layer"].w)
    tensor([[3., 0.],
            [0., 5.]])
    """

    lora: LoRA
    m: Float[Tensor, " out"]
    norms: Float[Tensor, " out"] | None = None

    def adapt_layer(self, layer: Any, path: str, seed: Int[Tensor, ""] | None) -> Any:
        """W' = row ⊙ V: LoRA's layer, and row = m / ‖V‖. `seed` draws the dropout; None is none."""
        adapted = self.lora.adapt_layer(layer, path, seed)
        rows, _ = shape(layer.w)
        if self.m.shape[0] != rows:
            raise InputError(f"DoRA at {path} has {self.m.shape[0]} magnitudes, but the base has {rows} rows")
        norms = self.norms
        if norms is None:  # a constant to every derivative
            norms = tree_map(torch.detach, self).direction_norms(tree_map(torch.detach, layer.w))
        return replace(adapted, w=replace(adapted.w, row=self.m / norms.clamp(min=1e-30)))

    def direction_norms(self, w: Weight) -> Float[Tensor, " out"]:
        """‖W + s·B·A‖ by row."""
        b, scale = scaled_b(self.lora)
        return row_norms(w, self.lora.a, b, scale)


def with_norms(adapters: Adapters, norms: Mapping[str, Float[Tensor, " out"]]) -> Adapters:
    """`adapters` in which each DoRA with a path in `norms` has them."""
    known = {
        path: replace(x, norms=norms[path]) for path, x in adapters.items() if isinstance(x, DoRA) and path in norms
    }
    return adapters | known


def dora(
    params: Any,
    rng: torch.Generator,
    rank: int = RANK,
    alpha: int | float | None = None,
    target: str = TARGET,
    rs: bool = False,
    dropout: float = 0.0,
    *,
    rank_pattern: Mapping[str, int] = MappingProxyType({}),
    alpha_pattern: Mapping[str, int | float] = MappingProxyType({}),
) -> Adapters:
    """A fresh DoRA on every layer whose path matches `target`: a fresh LoRA, and m = ‖W‖ by row, so that it begins as
    the identity, to the bit.

    Args:
        params: The base, quantized or not.
        rng: A key: each A is drawn from fold_in(rng, path).
        rank: Rows of A and columns of B.
        alpha: The strength: s = alpha / rank, or alpha / √rank if `rs`. None is twice a layer's rank.
        target: A regular expression that matches a layer's path in full; by default every matrix of the blocks.
        rs: Rank-stabilized scaling.
        dropout: Probability of dropping an element of A's input in training.
        rank_pattern: Other ranks, as in `lora`.
        alpha_pattern: Other strengths, as in `lora`.

    Raises:
        InputError: as `lora` does.

    Source: Liu et al. 2024 (DoRA), section 4.1.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> fgpt.dora(params, fgpt.key(1), rank=2)["blocks.0.attn.q"].m.shape
    torch.Size([8])
    """
    weights = weight_matrices(params)
    adapters: Adapters = {}
    loras = lora(params, rng, rank, alpha, target, rs, dropout, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    for path, x in loras.items():
        assert isinstance(x, LoRA)
        adapters[path] = DoRA(x, row_norms(weights[path], x.a, x.b, x.scale))
    return adapters
