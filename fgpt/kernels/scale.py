"""What DoRA and IA3 do to the product y of a frozen matrix, which holds a bias that is not theirs to scale:

    y' = row ⊙ (y + low Bᵀ) + (1 - row) ⊙ bias

so that y' is y itself, to the bit, where row is 1 and B is 0. As wide as an activation and as cheap as reading it, so
that what it costs is memory. The fast path scales y and adds low (row ⊙ B)ᵀ to that in place, which reads and writes no
more than LoRA's sum; and it keeps y' for the backward, as what reads y' mostly does too, and neither y nor the sum:

    d row = Σ_t g_t ⊙ (y'_t - bias) / row

That is on a CPU, where it can be asked whether all of row is far enough from 0; elsewhere the sum is made and kept.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.transforms import transformed

FAR = 0.125
"""The least |row| through which the sum is read back from y': what rounding leaves of the bias grows by 1 / row."""


def reference(
    y: Float[Tensor, "*batch out"],
    row: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None = None,
    low: Float[Tensor, "*batch rank"] | None = None,
    b: Float[Tensor, "out rank"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """The definition."""
    y = y if low is None or b is None else added(y, low, b)
    return y * row if bias is None else torch.addcmul((1 - row) * bias, y, row)


def added(
    y: Float[Tensor, "*batch out"], low: Float[Tensor, "*batch rank"], b: Float[Tensor, "out rank"]
) -> Float[Tensor, "*batch out"]:
    """y + low Bᵀ: addmm adds the update in the product's own pass over y."""
    return torch.addmm(_columns(y), _columns(low), b.T).view(y.shape)


class _Scaled(torch.autograd.Function):
    """`reference`. Without a setup_context, as no transform ever meets it: one costs a signature at every call."""

    @staticmethod
    def forward(
        ctx: Any, through: bool, y: Tensor, row: Tensor, bias: Tensor | None, low: Tensor | None, b: Tensor | None
    ) -> Tensor:
        out = reference(y, row, bias)
        if low is not None and b is not None:  # in place of the copy of y that `added` begins with
            _columns(out).addmm_(_columns(low), (row[:, None] * b).T)
        ctx.through = through
        ctx.save_for_backward(out if through else y, row, bias, low, b)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept, row, bias, low, b = ctx.saved_tensors
        _, _, by_row, by_bias, by_low, by_b = ctx.needs_input_grad
        to_row, to_bias = None, None
        if by_row or by_bias:
            down, products, sums = _gradients(g, kept, row, bias)
            to_row = products / row if ctx.through else products
            to_bias = (1 - row) * sums if by_bias else None
        else:
            down = g * row
        to_low = down @ b if by_low else None
        to_b = _columns(down).T @ _columns(low) if by_b else None
        return None, down, to_row, to_bias, to_low, to_b


def _gradients(
    g: Float[Tensor, "*batch out"],
    y: Float[Tensor, "*batch out"],
    row: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None,
) -> tuple[Float[Tensor, "*batch out"], Float[Tensor, " out"], Float[Tensor, " out"]]:
    """(g ⊙ row, Σ_t g_t ⊙ (y_t - bias), Σ_t g_t)."""
    bias = torch.zeros_like(row) if bias is None else bias
    if torch.is_grad_enabled() or y.device.type != "cpu" or y.numel() == 0:
        return g * row, _columns(g * (y - bias)).sum(0), _columns(g).sum(0)
    # All three at once: the gradients of row ⊙ (y - mean) / deviation + shift, a batch norm that is not training.
    down, products, sums = torch.ops.aten.native_batch_norm_backward(
        _columns(g), _columns(y), row, bias, torch.ones_like(row), None, None, False, 0.0, [True, True, True]
    )
    return down.view(g.shape), products, sums


def _columns(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def scaled(
    y: Float[Tensor, "*batch out"],
    row: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None = None,
    low: Float[Tensor, "*batch rank"] | None = None,
    b: Float[Tensor, "out rank"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """`reference`, in one tensor of the width of y each way."""
    if transformed():
        return reference(y, row, bias, low, b)
    through = row.device.type == "cpu" and torch.linalg.vector_norm(row.detach(), -math.inf).item() > FAR
    if not through and low is not None and b is not None:
        y, low, b = added(y, low, b), None, None
    return _Scaled.apply(through, y, row, bias, low, b)  # pyright: ignore[reportReturnType]
