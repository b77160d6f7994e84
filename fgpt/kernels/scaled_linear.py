"""The product of a frozen matrix whose rows DoRA or IA3 scale, under a bias that is not theirs to scale:

    y' = row ⊙ (W x + bias + s B A x) + (1 - row) ⊙ bias

so that y' is W x + bias itself, to the bit, where row is 1 and B is 0. The scale is as wide as an activation and as
cheap as reading it, so that what it costs is memory's time. The fast path scales the product where it lies, and adds
s (row ⊙ B) A x to it there; it keeps y' for the backward, as what reads y' mostly does too, and neither the product nor
the sum,

    d row = Σ_t g_t ⊙ (y'_t - bias) / row

and lets the two products that make the gradient of x make one sum. It is for a CPU, where it can be asked whether all
of row is far enough from 0; elsewhere `times` keeps the sum.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.functorch_state import in_transform_or_compile
from fgpt.kernels.quantized_linear import Quantized, linear_input_grad, quantized_linear

MIN_SCALE = 0.125
"""The least |row| through which the sum is read back from y': what rounding leaves of the bias grows by 1 / row."""


def _definition(y: Tensor, row: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mul(y, row, out=out) if bias is None else torch.addcmul((1 - row) * bias, y, row, out=out)


class _ScaleRows(torch.autograd.Function):
    """Without a setup_context, as no transform ever meets it: one costs a signature at every call."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, row, bias)
        return _definition(y, row, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, row, bias = ctx.saved_tensors
        _, by_row, by_bias = ctx.needs_input_grad
        down, products, sums = _gradients(g, y, row, bias, by_row or by_bias)
        return down, products, (1 - row) * sums if by_bias else None


def scale_rows(
    y: Float[Tensor, "*batch out"], row: Float[Tensor, " out"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*batch out"]:
    """row ⊙ y + (1 - row) ⊙ bias, for any y, in its dtype."""
    row, bias = row.to(y.dtype), None if bias is None else bias.to(y.dtype)
    if in_transform_or_compile():
        return _definition(y, row, bias)
    scaled: Any = _ScaleRows.apply(y.reshape(-1, y.shape[-1]), row, bias)
    return scaled.view(y.shape)


def _gradients(
    g: Float[Tensor, "rows out"],
    y: Float[Tensor, "rows out"],
    row: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None,
    wanted: bool,
) -> tuple[Float[Tensor, "rows out"], Float[Tensor, " out"] | None, Float[Tensor, " out"] | None]:
    """(g ⊙ row, Σ_t g_t ⊙ (y_t - bias), Σ_t g_t), the sums where they are `wanted`."""
    if not wanted:
        return g * row, None, None
    bias = torch.zeros_like(row) if bias is None else bias
    if torch.is_grad_enabled() or y.device.type != "cpu" or y.numel() == 0:
        return g * row, (g * (y - bias)).sum(0), g.sum(0)
    # All three at once: the gradients of row ⊙ (y - mean) / deviation + shift, a batch norm that is not training.
    return torch.ops.aten.native_batch_norm_backward(
        g, y, row, bias, torch.ones_like(row), None, None, False, 0.0, [True, True, True]
    )


def can_reconstruct(row: Float[Tensor, " out"]) -> bool:
    """Whether `scaled` is to be called: the scaled product can be read back, and no transform surrounds the call."""
    return not in_transform_or_compile() and row.device.type == "cpu" and row.detach().abs().min().item() > MIN_SCALE


class _Scaled(torch.autograd.Function):
    """Without a setup_context, as `_ScaleRows`."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        x: Tensor,
        inner: Tensor,
        w: Tensor | Quantized,
        row: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        if isinstance(w, Tensor):
            y = F.linear(x, w, bias)
        else:
            y = quantized_linear(x, w)
            y = y if bias is None else y + bias
        y = _definition(y, row, bias, out=y)
        low = None
        if a is not None and b is not None:
            low = F.linear(inner, a)
            y.addmm_(low, (row[:, None] * b).T, alpha=scale)
        ctx.scale, ctx.quantized = scale, None if isinstance(w, Tensor) else w
        ctx.once = inner is x  # x's gradient through A is then part of x's
        kept = x if ctx.needs_input_grad[3] else None, None if low is None else inner
        ctx.save_for_backward(*kept, w if isinstance(w, Tensor) else None, row, bias, a, b, low, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, inner, w, row, bias, a, b, low, y = ctx.saved_tensors
        _, by_x, by_inner, by_w, by_row, by_bias, by_a, by_b = ctx.needs_input_grad
        down, products, sums = _gradients(g, y, row, bias, by_row or by_bias)
        to_x = linear_input_grad(down, ctx.quantized if w is None else w) if by_x else None
        to_inner, to_a, to_b = None, None, None
        if low is not None:
            if torch.is_grad_enabled():  # to be differentiated again, through what made it
                low = F.linear(inner, a)
            to_low = down @ (ctx.scale * b)
            if to_x is not None and ctx.once:
                to_x = to_x.addmm_(to_low, a)
            elif by_inner:
                to_inner = to_low @ a
            to_a = to_low.T @ inner if by_a else None
            to_b = ctx.scale * (down.T @ low) if by_b else None
        return (
            None,
            to_x,
            to_inner,
            down.T @ x if by_w else None,
            None if products is None else products / row,
            sums if by_bias else None,
            to_a,
            to_b,
        )


def fused_scaled_linear(
    x: Float[Tensor, "rows in"],
    inner: Float[Tensor, "rows in"],
    w: Float[Tensor, "out in"] | Quantized,
    row: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "rank in"] | None,
    b: Float[Tensor, "out rank"] | None,
    scale: float,
) -> Float[Tensor, "rows out"]:
    """The definition, with A x̃ for A x where dropout has made x̃, `inner`, of x; in one tensor of the width of y each
    way. For plain autograd, where row is `readable`.
    """
    return _Scaled.apply(scale, x, inner, w, row, bias, a, b)  # pyright: ignore[reportReturnType]
