"""The product of a frozen matrix whose rows DoRA or IA3 scale, under a bias that is not theirs to scale:

    y' = row ⊙ (W x + bias + s B A x) + (1 - row) ⊙ bias

so that y' is W x + bias itself, to the bit, where row is 1 and B is 0. The scale is as wide as an activation and as
cheap as reading it, so that what it costs is memory's time. The fast path scales the product where it lies, and adds
s (row ⊙ B) A x to it there; it keeps y' for the backward, as what reads y' mostly does too, and neither the product nor
the sum,

    d row = Σ_t g_t ⊙ (y'_t - bias) / row

and lets the two products that make the gradient of x make one sum. It is for a CPU, where it can be asked whether all
of row is far enough from 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.quantised import Quantised, adjoint, frozen
from fgpt.kernels.transforms import transformed

FAR = 0.125
"""The least |row| through which the sum is read back from y': what rounding leaves of the bias grows by 1 / row."""


def times(
    y: Float[Tensor, "rows out"],
    row: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None,
    out: Float[Tensor, "rows out"] | None = None,
) -> Float[Tensor, "rows out"]:
    """row ⊙ y + (1 - row) ⊙ bias."""
    return torch.mul(y, row, out=out) if bias is None else torch.addcmul((1 - row) * bias, y, row, out=out)


def readable(row: Float[Tensor, " out"]) -> bool:
    """Whether `scaled` is to be called: the scaled product can be read back, and no transform surrounds the call."""
    return not transformed() and row.device.type == "cpu" and row.detach().abs().min().item() > FAR


class _Scaled(torch.autograd.Function):
    """Without a setup_context, as no transform ever meets it: one costs a signature at every call."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        x: Tensor,
        w: Tensor | Quantised,
        row: Tensor,
        bias: Tensor | None,
        inner: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        y = frozen(x, w, bias)
        y = times(y, row, bias, out=y)
        low = None
        if inner is not None and a is not None and b is not None:
            low = F.linear(inner, a)
            y.addmm_(low, (row[:, None] * b).T, alpha=scale)
        ctx.scale, ctx.quantised = scale, None if isinstance(w, Tensor) else w
        ctx.once = inner is x  # x's gradient through A is then part of x's
        kept = x if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept, None if ctx.quantised else w, row, bias, inner, a, b, low, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w, row, bias, inner, a, b, low, y = ctx.saved_tensors
        _, by_x, by_w, by_row, by_bias, by_inner, by_a, by_b = ctx.needs_input_grad
        if by_row or by_bias:
            down, products, sums = _gradients(g, y, row, bias)
        else:
            down, products, sums = g * row, None, None
        to_x, to_inner, to_a, to_b = None, None, None, None
        if by_x:
            to_x = down @ w if ctx.quantised is None else adjoint(down, ctx.quantised)
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
            down.T @ x if by_w else None,
            products / row if by_row else None,
            sums if by_bias else None,
            to_inner,
            to_a,
            to_b,
        )


def _gradients(
    g: Float[Tensor, "rows out"],
    y: Float[Tensor, "rows out"],
    row: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None,
) -> tuple[Float[Tensor, "rows out"], Float[Tensor, " out"], Float[Tensor, " out"]]:
    """(g ⊙ row, Σ_t g_t ⊙ (y_t - bias), Σ_t g_t)."""
    bias = torch.zeros_like(row) if bias is None else bias
    if torch.is_grad_enabled() or y.numel() == 0:
        return g * row, (g * (y - bias)).sum(0), g.sum(0)
    # All three at once: the gradients of row ⊙ (y - mean) / deviation + shift, a batch norm that is not training.
    return torch.ops.aten.native_batch_norm_backward(
        g, y, row, bias, torch.ones_like(row), None, None, False, 0.0, [True, True, True]
    )


def scaled(
    x: Float[Tensor, "rows in"],
    w: Float[Tensor, "out in"] | Quantised,
    row: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None = None,
    inner: Float[Tensor, "rows in"] | None = None,
    a: Float[Tensor, "rank in"] | None = None,
    b: Float[Tensor, "out rank"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "rows out"]:
    """The definition, with A x̃ for A x where dropout has made x̃, `inner`, of x; in one tensor of the width of y each
    way. For plain autograd, where row is `readable`.
    """
    return _Scaled.apply(scale, x, w, row, bias, inner, a, b)  # pyright: ignore[reportReturnType]
