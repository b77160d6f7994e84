"""LoRA, a product of rank r added to a weight:

W' = W + s·B·A
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.adapter_defaults import RANK, TARGET, default_alpha
from fgpt.adapter_types import Adapters
from fgpt.errors import InputError
from fgpt.layers import weight_matrices
from fgpt.patterns import by_pattern
from fgpt.rng import fold_in
from fgpt.tree import device, node, select, static
from fgpt.weights import Adapted, Weight, shape


@node
class LoRA:
    """W' = W + s·B·A, with s = alpha / rank, or alpha / √rank if rank-stabilized.

    Args:
        a: A, which projects the layer's input to `rank` components. `lora` draws it.
        b: B, which projects them to the layer's output. `lora` sets it to 0.
        alpha: The strength, from which s follows.
        rs: Rank-stabilized scaling: s = alpha / √rank.

    Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023 (rsLoRA), theorem 3.2.

    >>> import fgpt
    >>> x = fgpt.LoRA(a=torch.ones(2, 8), b=torch.zeros(4, 2), alpha=16.0)
    >>> x.scale
    8.0
    """

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    alpha: float = static()
    rs: bool = static(default=False)
    dropout: float = static(default=0.0)
    """Probability of dropping an element of A's input in training, that is, if `adapt` is given a key."""
    scaling: Float[Tensor, ""] | None = None
    """s itself, in place of alpha and the rank: in a stack whose members differ in them. No gradient reaches it."""

    @property
    def scale(self) -> Any:
        """s: a float, or in a stack the member's own as a tensor."""
        if self.scaling is not None:
            return self.scaling.detach()
        rank = self.a.shape[0]
        return self.alpha / (rank**0.5 if self.rs else rank)

    def adapt_layer(self, layer: Any, path: str, seed: Int[Tensor, ""] | None) -> Any:
        """W' = W + s·B·A. `seed` draws the dropout; None is none."""
        _check_fits(self, layer.w, path)
        b, scale = scaled_b(self)
        dropout = 0.0 if seed is None else self.dropout
        w = Adapted(layer.w, self.a, b, seed=seed if dropout else None, scale=scale, dropout=dropout)
        return replace(layer, w=w)


def scaled_b(x: LoRA) -> tuple[Tensor, float]:
    """(B, s), or (s·B, 1) in a stack, whose s is a tensor."""
    return (x.scale * x.b, 1.0) if isinstance(x.scale, Tensor) else (x.b, x.scale)


def _check_fits(x: LoRA, w: Weight, path: str) -> None:
    if x.a.shape[0] != x.b.shape[1]:
        raise InputError(f"adapter at {path} has A of rank {x.a.shape[0]}, but B of rank {x.b.shape[1]}")
    size = (x.b.shape[0], x.a.shape[1])
    if size != shape(w):
        raise InputError(f"adapter at {path} fits a weight of {list(size)}, but the base has {list(shape(w))}")


def check_rank(rank: int, w: Weight, path: str) -> None:
    """Raises InputError if no LoRA on the matrix at `path` can have that rank."""
    out, inp = shape(w)
    if not 1 <= rank <= min(out, inp):
        raise InputError(f"rank {rank} on {path}: expected 1 to {min(out, inp)}, the smaller side of [{out}, {inp}]")


def lora(
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
    r"""A fresh LoRA on every layer whose path matches `target`, in fp32. B = 0, so it begins as the identity; A is
    uniform in ±1/√in (Kaiming, as in the paper's code).

    Args:
        params: The base, quantized or not.
        rng: A key: each A is drawn from fold_in(rng, path).
        rank: Rows of A and columns of B.
        alpha: The strength: s = alpha / rank, or alpha / √rank if `rs`. None is twice a layer's rank.
        target: A regular expression that matches a layer's path in full; by default every matrix of the blocks.
        rs: Rank-stabilized scaling.
        dropout: Probability of dropping an element of A's input in training.
        rank_pattern: Other ranks, by regular expressions for whole paths of layers; the first that matches counts.
        alpha_pattern: Other strengths, likewise.

    Raises:
        InputError: if `target` or a pattern matches nothing, a rank exceeds the smaller side of a layer, or `dropout`
            is not in [0, 1).

    Source: Hu et al. 2021 (LoRA), section 4.1; Kalajdzievski 2023 (rsLoRA), theorem 3.2; PEFT, for the patterns.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> list(fgpt.lora(params, fgpt.key(1), rank=2, target=r"blocks\..*\.(q|v)"))
    ['blocks.0.attn.q', 'blocks.0.attn.v']
    """
    if not 0 <= dropout < 1:
        raise InputError(f"dropout {dropout}: expected a probability from 0 to less than 1")
    weights = weight_matrices(params)
    paths = select(weights, target)
    ranks = by_pattern(paths, rank_pattern, rank, "rank_pattern")
    alphas = by_pattern(paths, alpha_pattern, alpha, "alpha_pattern")
    adapters: Adapters = {}
    for path in paths:
        out, inp = shape(weights[path])
        rank = ranks[path]
        check_rank(rank, weights[path], path)
        where, bound = device({path: weights[path]}), inp**-0.5
        a = torch.empty(rank, inp, dtype=torch.float32).uniform_(-bound, bound, generator=fold_in(rng, path))
        b = torch.zeros(out, rank, dtype=torch.float32)
        strength = default_alpha(rank) if (value := alphas[path]) is None else value
        adapters[path] = LoRA(a.to(where), b.to(where), float(strength), rs, dropout)
    return adapters
