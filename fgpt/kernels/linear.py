"""The product of a base weight, a tensor or a quantized matrix, with and without an adapter on it:

    base_linear      y = x Wᵀ + bias
    adapted_linear   y = row ⊙ (x Wᵀ + bias + s x̃ Aᵀ Bᵀ) + (1 - row) ⊙ bias        x̃ = x after dropout

The kernel is chosen by the operands alone, and no caller knows which one ran.

    reference     plain torch
    fast paths    `gemv` for a few rows, `quantized_linear`, `grad_only_linear`, and for scaled rows outside of
                  transforms `fused_scaled_linear`; the low-rank term is added in place there
    transforms    under any of them, and compiled, the same terms out of place: every composition passes
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.kernels.dropout import dropout
from fgpt.kernels.functorch_state import in_transform_or_compile
from fgpt.kernels.grad_only_linear import GradOnly, grad_only_linear
from fgpt.kernels.mapped_linear import applies as maps
from fgpt.kernels.mapped_linear import mapped_linear
from fgpt.kernels.quantized_linear import FrozenMatrix, frozen_product, is_quantized
from fgpt.kernels.scaled_linear import can_reconstruct, fused_scaled_linear, scale_rows
from fgpt.kernels.sharded_parameter import ShardedParameter, parameter_linear


def reference(
    x: Float[Tensor, "rows in"],
    w: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"],
    *,
    a: Float[Tensor, "rank in"],
    b: Float[Tensor, "out rank"],
    row: Float[Tensor, " out"],
    scale: float,
    seed: Int[Tensor, ""],
    p: float,
) -> Float[Tensor, "rows out"]:
    """The definition of `adapted_linear`, every operand present."""
    return row * (x @ w.T + bias + scale * dropout(x, seed, p) @ a.T @ b.T) + (1 - row) * bias


def base_linear(
    x: Float[Tensor, "*batch in"],
    w: Float[Tensor, "out in"] | FrozenMatrix | ShardedParameter | GradOnly,
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + bias."""
    if isinstance(w, ShardedParameter):
        return parameter_linear(x, w, bias)
    if isinstance(w, GradOnly):
        y = grad_only_linear(x, w.base)
        return y if bias is None else y + bias
    if not is_quantized(w) and maps(x, w, bias):
        rows = x.reshape(-1, x.shape[-1])
        return mapped_linear(rows, rows, w, bias, None, None, 1.0).view(*x.shape[:-1], w.shape[0])
    return frozen_product(x, w, bias)


def adapted_linear(
    x: Float[Tensor, "*batch in"],
    w: Float[Tensor, "out in"] | FrozenMatrix,
    bias: Float[Tensor, " out"] | None,
    *,
    a: Float[Tensor, "rank in"] | None,
    b: Float[Tensor, "out rank"] | None,
    row: Float[Tensor, " out"] | None,
    scale: float,
    seed: Int[Tensor, ""] | None,
    p: float,
    low: Float[Tensor, "*batch rank"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """row ⊙ (x Wᵀ + bias + s x̃ Aᵀ Bᵀ) + (1 - row) ⊙ bias; without A and B, or without `row`, what is left of it.
    `seed` drops each element of x̃ with probability p. `low` is s x̃ Aᵀ, if it is known.

    Outside transforms nothing of the width of y is allocated twice: the low-rank term is added in place, and a `row`
    whose elements are all far from zero is fused with it.
    """
    rows = x.reshape(-1, x.shape[-1])
    if row is not None and can_reconstruct(row):
        row, bias, a, b = (None if t is None else t.to(x.dtype) for t in (row, bias, a, b))
        assert row is not None
        y = fused_scaled_linear(rows, dropout(rows, seed, p), w, row, bias, a, b, scale)
    elif low is None and a is not None and b is not None and maps(rows, w, bias, a, b):
        y = mapped_linear(rows, dropout(rows, seed, p), w, bias, a.to(x.dtype), b.to(x.dtype), scale)
        y = y if row is None else scale_rows(y, row, bias)
    else:
        y = base_linear(rows, w, bias)
        if a is not None and b is not None:
            low = scale * F.linear(dropout(x, seed, p), a.to(x.dtype)) if low is None else low
            # In place: nobody else reads y yet, and it is no view, as `rows` is flat.
            add = torch.addmm if in_transform_or_compile() else Tensor.addmm_
            y = add(y, low.reshape(-1, low.shape[-1]), _transpose(b.to(y.dtype)))
        y = y if row is None else scale_rows(y, row, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def add_low_rank(
    y: Float[Tensor, "*batch out"], low: Float[Tensor, "*batch rank"], b: Float[Tensor, "out rank"]
) -> Float[Tensor, "*batch out"]:
    """y + low Bᵀ, out of place: for a y that others may read."""
    low = low.reshape(-1, low.shape[-1])
    return torch.addmm(y.reshape(-1, y.shape[-1]), low, _transpose(b.to(y.dtype))).view(y.shape)


NARROW = 8
"""Columns of a B whose transpose is copied: on a CPU the two products of its backward then take a quarter to a half of
their time, 3 to 7 % of a step, and the copy none. With twice the columns nothing is gained.
"""


def _transpose(b: Float[Tensor, "out rank"]) -> Float[Tensor, "rank out"]:
    return b.T.contiguous() if b.shape[1] <= NARROW else b.T
