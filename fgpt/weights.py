"""The weight algebra. A weight is a tensor, a quantized matrix, one in parts, or an adapted weight. It has one meaning,
`dense`, and one fast reading, `linear`:

    linear(x, w) == x @ dense(w).T

    Adapted:  W' = diag(row) · (W + s·B·A) · diag(col)

One normal form holds every adapter of the family: LoRA is s·B·A; DoRA is that and row = m / ‖W + s·B·A‖; IA3 is row or
col alone; LoRA-XS has M·A for A, with a small M. The base of an adapted weight is any weight, so adapters stack with no
further code. Weights are [out, in] everywhere. Which kernel computes a reading is the business of `fgpt.kernels`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias, Union

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.kernels import row_norms as base_rows
from fgpt.kernels.dropout import dropout
from fgpt.kernels.embedding import embedding
from fgpt.kernels.functorch_state import in_vmap
from fgpt.kernels.grad_only_linear import GradOnly
from fgpt.kernels.linear import adapted_linear, add_low_rank, base_linear
from fgpt.kernels.quantized_linear import FROZEN, FrozenMatrix, Rotated, dequantize, rotate_rows
from fgpt.kernels.scaled_linear import scale_rows
from fgpt.kernels.second_moments import SecondMoments, collect_moments
from fgpt.kernels.sharded_matrix import local_part
from fgpt.kernels.sharded_parameter import ShardedParameter, gather
from fgpt.tree import node, static


@node
class Adapted:
    """W' = diag(row) · (W + s·B·M·A) · diag(col): a base weight with an adapter. A field that is None does nothing.

    Args:
        base: W: a tensor, a quantized or sharded matrix, or an adapted weight.
        a: A.
        b: B.
        row: The factor of each output.
        col: The factor of each input.
        seed: Draws the dropout of the input of A; only `linear` applies it.
        mid: M, between A and B: what LoRA-XS trains.
        moments: What `linear` collects in a backward pass, for `fgpt.transforms.kronecker`.
        scale: s.
        dropout: Probability of dropping an element of the input of A.

    Source: Hu et al. 2021 (LoRA), section 4.1; Liu et al. 2024 (DoRA), section 4.1; Liu et al. 2022 (IA3), section 3.3;
    Bałazy et al. 2024 (LoRA-XS), section 3.

    >>> import fgpt
    >>> fgpt.dense(fgpt.Adapted(torch.eye(2), row=torch.tensor([1.0, 2.0]), col=torch.tensor([3.0, 4.0])))
    tensor([[3., 0.],
            [0., 8.]])
    """

    base: "Weight"
    a: Float[Tensor, "rank in"] | None = None
    b: Float[Tensor, "out rank"] | None = None
    row: Float[Tensor, " out"] | None = None
    col: Float[Tensor, " in"] | None = None
    seed: Int[Tensor, ""] | None = None
    mid: Float[Tensor, "rank rank"] | None = None
    moments: SecondMoments | None = None
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)

    @property
    def down(self) -> Float[Tensor, "rank in"] | None:
        """M·A, or A: what the input is multiplied with."""
        return self.a if self.a is None or self.mid is None else self.mid @ self.a


Weight: TypeAlias = Union[Tensor, FrozenMatrix, ShardedParameter, GradOnly, Adapted]
NOT_FUSED = (Adapted, GradOnly, ShardedParameter)
"""What no kernel multiplies with and adapts at once."""


def dense(w: Weight) -> Float[Tensor, "out in"]:
    """The merged reading: the one matrix that `w` means, in the dtype of its base.

    >>> import fgpt
    >>> w = fgpt.Adapted(torch.eye(2), a=torch.ones(1, 2), b=torch.ones(2, 1), scale=0.5)
    >>> fgpt.dense(w)
    tensor([[1.5000, 0.5000],
            [0.5000, 1.5000]])
    """
    if isinstance(w, Tensor):
        return w
    if isinstance(w, GradOnly):
        return dense(w.base)
    if isinstance(w, FROZEN):
        return dequantize(w)
    if isinstance(w, ShardedParameter):
        return gather(w)
    m, down = dense(w.base), w.down
    if down is not None and w.b is not None:
        m = m + w.scale * (w.b @ down)
    if w.row is not None:
        m = w.row[:, None] * m
    return (m if w.col is None else m * w.col).to(dtype(w))


def linear(
    x: Float[Tensor, "*batch in"], w: Weight, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """The factored reading: x @ dense(w).T + bias, and neither B·A nor a scaled W is ever formed.

        x' = col ⊙ x        y = row ⊙ (x' Wᵀ + s x' Aᵀ Bᵀ) + bias

    Args:
        x: Inputs, in the dtype of the activations.
        w: The weight, [out, in].
        bias: Added last, and not scaled by row.

    >>> import fgpt
    >>> w = fgpt.Adapted(torch.eye(2), a=torch.ones(1, 2), b=torch.ones(2, 1), scale=0.5)
    >>> fgpt.linear(torch.tensor([[2.0, 4.0]]), w)
    tensor([[5., 7.]])
    """
    if not isinstance(w, Adapted):
        return base_linear(x, w, bias)
    if w.moments is not None:
        return collect_moments(linear(x, replace(w, moments=None), bias), x, w.moments)
    x = x if w.col is None else x * w.col.to(x.dtype)
    if not isinstance(w.base, NOT_FUSED):  # one adapter over a base weight: a kernel may fuse the rest
        return adapted_linear(x, w.base, bias, a=w.down, b=w.b, row=w.row, scale=w.scale, seed=w.seed, p=w.dropout)
    y = linear(x, w.base, bias)
    if w.a is not None and w.b is not None:
        y = add_low_rank(y, lora_down(x, w), w.b)
    return y if w.row is None else scale_rows(y, w.row, bias)


def linear_group(
    x: Float[Tensor, "*batch in"], layers: Sequence[tuple[Weight, Float[Tensor, " _out"] | None]]
) -> list[Float[Tensor, "*batch _out"]]:
    """`linear` for several layers (w, bias) of one input, such as q, k and v: the products of x with their A's are one,
    and x is rotated once.

        [low₁ low₂ ..] = x [s₁A₁; s₂A₂; ..]ᵀ        y_i = x W_iᵀ + low_i B_iᵀ + bias_i        x W_iᵀ = (x R) Q_iᵀ

    >>> import fgpt
    >>> w = fgpt.Adapted(torch.eye(2), a=torch.ones(1, 2), b=torch.ones(2, 1), scale=0.5)
    >>> linear_group(torch.tensor([[2.0, 4.0]]), [(w, None), (torch.eye(2), None)])
    [tensor([[5., 7.]]), tensor([[2., 4.]])]
    """
    low_ranks = {i: w for i, (w, _) in enumerate(layers) if isinstance(w, Adapted) and _is_plain_low_rank(w)}
    bases = [w.base if i in low_ranks and isinstance(w, Adapted) else w for i, (w, _) in enumerate(layers)]
    rotated = [base for base in bases if isinstance(base, Rotated)]
    rotations = {(base.block, type(local_part(base.base))) for base in rotated}
    # A mapped product adds its low rank in place.
    if in_vmap() or len(rotations) > 1 or max(len(low_ranks), len(rotated)) < 2:
        return [linear(x, w, bias) for w, bias in layers]
    lows: dict[int, Tensor] = {}
    if low_ranks:
        scaled_as: list[Tensor] = []
        for w in low_ranks.values():
            down = w.down
            assert down is not None
            scaled_as.append(w.scale * down.to(x.dtype))
        parts = F.linear(x, torch.cat(scaled_as)).split([len(a) for a in scaled_as], -1)
        lows = dict(zip(low_ranks, parts, strict=True))
    xr = rotate_rows(x, rotated[0]) if rotated else x
    outputs: list[Tensor] = []
    for i, ((w, bias), base) in enumerate(zip(layers, bases, strict=True)):
        rows, q = (xr, base.base) if isinstance(base, Rotated) else (x, base)
        if isinstance(w, Adapted) and i in lows:
            assert not isinstance(q, NOT_FUSED)
            y = adapted_linear(rows, q, bias, a=w.down, b=w.b, row=None, scale=w.scale, seed=None, p=0.0, low=lows[i])
        else:
            y = linear(rows, q, bias)
        outputs.append(y)
    return outputs


def _is_plain_low_rank(w: Adapted) -> bool:
    """Whether `w` is W + s·B·A over a base weight, without dropout: its A reads x as it is."""
    if isinstance(w.base, NOT_FUSED):
        return False
    has_others = w.row is not None or w.col is not None or w.seed is not None or w.moments is not None
    return w.a is not None and w.b is not None and not has_others


def lora_down(x: Float[Tensor, "*batch in"], w: Adapted) -> Float[Tensor, "*batch rank"]:
    """s A x, with x as A sees it: after dropout."""
    a = w.down
    assert a is not None
    return w.scale * F.linear(dropout(x, w.seed, w.dropout), a.to(x.dtype))


def embed(tokens: Int[Tensor, "*batch"], w: Weight) -> Float[Tensor, "*batch in"]:
    """Rows of `w`: dense(w)[tokens]. An adapter on a tied table moves the embedding and the head together.

    >>> import fgpt
    >>> fgpt.embed(torch.tensor([2, 0]), torch.eye(3))
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    if isinstance(w, GradOnly):
        return embed(tokens, w.base)
    if not isinstance(w, Adapted):
        return embedding(tokens, w)
    x, down = embed(tokens, w.base), w.down
    if down is not None and w.b is not None:
        x = x + w.scale * (embed(tokens, w.b) @ down).to(x.dtype)
    if w.row is not None:
        x = x * w.row[tokens][..., None].to(x.dtype)
    return x if w.col is None else x * w.col.to(x.dtype)


def row_norms(
    w: Weight, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"], scale: float
) -> Float[Tensor, " out"]:
    """‖w_i + s b_i A‖ for every row i, without forming B·A or an fp32 copy of W:

        ‖w_i + s b_i A‖² = ‖w_i‖² + b_i · (2s A w_iᵀ + s² A Aᵀ b_iᵀ)

    Args:
        w: W.
        a: A.
        b: B.
        scale: s.

    >>> row_norms(torch.eye(2), torch.ones(1, 2), torch.zeros(2, 1), 1.0)
    tensor([1., 1.])
    """
    squares, cross = row_sq_and_cross(w, a)
    total = squares + torch.linalg.vecdot(b, torch.addmm(cross, b, a @ a.T, beta=2 * scale, alpha=scale**2))
    # If s·B·A nearly cancels W, the sum is rounding error and may be negative: no norm is below fp32's resolution of W.
    return torch.maximum(total, torch.finfo(total.dtype).eps * squares).sqrt()


def row_sq_and_cross(w: Weight, a: Float[Tensor, "rank in"]) -> tuple[Float[Tensor, " out"], Float[Tensor, "out rank"]]:
    """(‖w_i‖², w_i Aᵀ) for every row i, in the dtype of A."""
    if isinstance(w, GradOnly):
        return row_sq_and_cross(w.base, a)
    if not isinstance(w, Adapted):
        return base_rows.row_sq_and_cross(dense(w) if isinstance(w, ShardedParameter) else w, a)
    if w.col is not None:  # columns are scaled after both terms: the norms of W alone do not give those of the product
        m = dense(w).to(a.dtype)
        return m.square().sum(-1), m @ a.T
    down = w.down
    if down is None or w.b is None:
        squares, cross = row_sq_and_cross(w.base, a)
    else:
        _, inner = row_sq_and_cross(w.base, torch.cat([down, a]))
        cross = inner[:, len(down) :] + w.scale * w.b @ (down @ a.T)
        squares = row_norms(w.base, down, w.b, w.scale).square()
    return (squares, cross) if w.row is None else (w.row**2 * squares, w.row[:, None] * cross)


def shape(w: Weight) -> tuple[int, int]:
    """(out, in)."""
    return shape(w.base) if isinstance(w, Adapted) else (w.shape[0], w.shape[1])


def dtype(w: Weight) -> torch.dtype:
    """The dtype of the innermost base, which activations share."""
    return dtype(w.base) if isinstance(w, Adapted) else w.dtype
