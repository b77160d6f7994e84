"""What DoRA and IA3 do to the product y of a frozen matrix, which holds a bias that is not theirs to scale:

    y' = row ⊙ (y + low Bᵀ) + (1 - row) ⊙ bias

so that y' is y itself, to the bit, where row is 1 and B is 0. As wide as an activation and as cheap as reading it, so
that what it costs is memory. The fast path scales y and adds low (row ⊙ B)ᵀ to that in place, which reads and writes no
more than LoRA's sum; and it keeps y' for the backward, as what reads y' mostly does too, and neither y nor the sum:

    d row = Σ_t g_t ⊙ (y'_t - bias) / row

That is on a CPU, where it can be asked whether all of row is far enough from 0; elsewhere the sum is made and kept.
"""

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
    return torch.addmm(y.reshape(-1, y.shape[-1]), low.reshape(-1, low.shape[-1]), b.T).view(y.shape)


class _Scaled(torch.autograd.Function):
    """`reference`. Without a setup_context, as no transform ever meets it: one costs a signature at every call."""

    @staticmethod
    def forward(
        ctx: Any, through: bool, y: Tensor, row: Tensor, bias: Tensor | None, low: Tensor | None, b: Tensor | None
    ) -> Tensor:
        out = y * row if bias is None else torch.addcmul((1 - row) * bias, y, row)
        if low is not None and b is not None:  # in place of the copy of y that `added` begins with
            _columns(out).addmm_(_columns(low), (row[:, None] * b).T)
        ctx.through = through
        ctx.save_for_backward(out if through else y, row, bias, low, b)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept, row, bias, low, b = ctx.saved_tensors
        _, _, by_row, by_bias, by_low, by_b = ctx.needs_input_grad
        down, shift = None, None
        if by_row or by_bias:
            products, sums = _sums(g, kept)
            down = products if bias is None else torch.addcmul(products, bias, sums, value=-1)
            down = down / row if ctx.through else down
            shift = (1 - row) * sums if by_bias else None
        to_low = g @ (row[:, None] * b) if by_low else None
        to_b = row[:, None] * (_columns(g).T @ _columns(low)) if by_b else None
        return None, g * row, down, shift, to_low, to_b


def _sums(g: Float[Tensor, "*batch out"], y: Float[Tensor, "*batch out"]) -> tuple[Tensor, Tensor]:
    """(Σ_t g_t ⊙ y_t, Σ_t g_t)."""
    g, y = _columns(g), _columns(y)
    if torch.is_grad_enabled() or y.device.type != "cpu" or y.dtype not in (torch.float32, torch.float64):
        return (g * y).sum(0), g.sum(0)  # in short dtypes the kernel below would sum in them
    # A LayerNorm of mean 0 and deviation 1 has them for the gradients of its scale and shift, in one pass over both.
    rows, columns = g.shape
    zeros, ones, any_scale = g.new_zeros(rows, 1), g.new_ones(rows, 1), g.new_ones(columns)
    _, products, sums = torch.ops.aten.native_layer_norm_backward(
        g, y, [columns], zeros, ones, any_scale, any_scale, [False, True, True]
    )
    return products, sums


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
    through = row.device.type == "cpu" and bool(row.detach().abs().amin() > FAR)
    if not through and low is not None and b is not None:
        y, low, b = added(y, low, b), None, None
    return _Scaled.apply(through, y, row, bias, low, b)  # pyright: ignore[reportReturnType]
