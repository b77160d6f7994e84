"""The weight algebra. A weight is a tensor or an adapted weight; it has one meaning, `dense`, and one fast reading,
`linear`:

    linear(x, w) == x @ dense(w).T

    Adapted:  W' = W + s·B·A

An adapted weight holds another weight, so adapters stack with no further code. Weights are [out, in] everywhere.
"""

from typing import TypeAlias, Union

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.tree import node, static


@node
class Adapted:
    """W + s·B·A, a frozen weight moved within the span of a rank-r product.

    Source: Hu et al. 2021 (LoRA), section 4.1.
    """

    base: "Weight"
    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    scale: float = static()


Weight: TypeAlias = Union[Tensor, Adapted]


def dense(w: Weight) -> Float[Tensor, "out in"]:
    """The merged reading: the one matrix that `w` means."""
    if isinstance(w, Tensor):
        return w
    return (dense(w.base) + w.scale * (w.b @ w.a)).to(dtype(w))


def products(x: Float[Tensor, "*batch in"], w: Weight) -> list[tuple[Tensor, Tensor]]:
    """The factored reading, undone: pairs (x_j, W_j) with x dense(w)ᵀ = Σ_j x_j W_jᵀ, the frozen weight first."""
    if isinstance(w, Tensor):
        return [(x, w)]
    return [*products(x, w.base), (w.scale * F.linear(x, w.a.to(x.dtype)), w.b.to(x.dtype))]


def linear(
    x: Float[Tensor, "*batch in"], w: Weight, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + s (x Aᵀ) Bᵀ + bias, never forming B·A."""
    (x, frozen), *updates = products(x, w)
    y = F.linear(x, frozen, bias)
    for low, up in updates:  # addmm adds the update in the product's own pass over y
        y = torch.addmm(y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1]), up.T).view(y.shape)
    return y


def embed(tokens: Int[Tensor, "*batch"], w: Weight) -> Float[Tensor, "*batch in"]:
    """Rows of `w`: dense(w)[tokens]. An adapter on a tied table thus moves embedding and head together."""
    if isinstance(w, Tensor):
        return F.embedding(tokens, w)
    rows = embed(tokens, w.base)
    return rows + w.scale * (F.embedding(tokens, w.b) @ w.a).to(rows.dtype)


def shape(w: Weight) -> tuple[int, int]:
    """(out, in)."""
    return (w.shape[0], w.shape[1]) if isinstance(w, Tensor) else shape(w.base)


def dtype(w: Weight) -> torch.dtype:
    """The dtype of the frozen weight at the bottom, which activations share."""
    return w.dtype if isinstance(w, Tensor) else dtype(w.base)
