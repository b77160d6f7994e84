"""The product of a frozen matrix whose rows DoRA or IA3 scale, with a bias that they do not scale:

    y' = row ⊙ (W x + bias + s B A x) + (1 - row) ⊙ bias

so that y' is W x + bias, to the bit, if row is 1 and B is 0. Scaling is limited by memory bandwidth. The fast path
scales the product in place and adds s (row ⊙ B) A x to it in place. For the backward it saves y', as the reader of y'
mostly does too, and neither the product nor the sum:

    d row = Σ_t g_t ⊙ (y'_t - bias) / row

The two products that make up the gradient of x are added in place as well. It is for a CPU, where one may look whether
every element of row is far enough from 0; elsewhere `scale_rows` saves the sum.

    reference     row ⊙ y + (1 - row) ⊙ bias, plain torch
    fast paths    `fused_scaled_linear` with the product, `scale_rows` for any y
    transforms    under any of them, and compiled, the reference; plain autograd may record the backward (create_graph)
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.functorch_state import in_transform_or_compile
from fgpt.kernels.quantized_linear import FrozenMatrix, frozen_product, linear_input_grad

MIN_SCALE = 0.125
"""The smallest |row| with which the sum is reconstructed from y': the rounding error of the bias grows by 1 / row."""


def reference(y: Tensor, row: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The definition of `scale_rows`: row ⊙ y + (1 - row) ⊙ bias."""
    return torch.mul(y, row, out=out) if bias is None else torch.addcmul((1 - row) * bias, y, row, out=out)


class _ScaleRows(torch.autograd.Function):
    """Without a setup_context, as no transform ever meets it: one would cost an inspected signature at every call."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, row, bias)
        return reference(y, row, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, row, bias = ctx.saved_tensors
        _, needs_row, needs_bias = ctx.needs_input_grad
        scaled_g, g_dot_y, g_sum = _gradients(g, y, row, bias, needs_row or needs_bias)
        return scaled_g, g_dot_y, (1 - row) * g_sum if needs_bias else None


def scale_rows(
    y: Float[Tensor, "*batch out"], row: Float[Tensor, " out"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*batch out"]:
    """row ⊙ y + (1 - row) ⊙ bias, for any y, in its dtype."""
    row, bias = row.to(y.dtype), None if bias is None else bias.to(y.dtype)
    if in_transform_or_compile():
        return reference(y, row, bias)
    scaled: Any = _ScaleRows.apply(y.reshape(-1, y.shape[-1]), row, bias)
    return scaled.view(y.shape)


def _gradients(
    g: Float[Tensor, "rows out"],
    y: Float[Tensor, "rows out"],
    row: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None,
    with_sums: bool,
) -> tuple[Float[Tensor, "rows out"], Float[Tensor, " out"] | None, Float[Tensor, " out"] | None]:
    """(g ⊙ row, Σ_t g_t ⊙ (y_t - bias), Σ_t g_t), the sums if `with_sums`."""
    if not with_sums:
        return g * row, None, None
    bias = torch.zeros_like(row) if bias is None else bias
    if torch.is_grad_enabled() or y.device.type != "cpu" or y.numel() == 0:
        return g * row, (g * (y - bias)).sum(0), g.sum(0)
    # All three in one kernel: the gradients of row ⊙ (y - mean) / deviation + shift, a batch norm in evaluation mode.
    return torch.ops.aten.native_batch_norm_backward(
        g, y, row, bias, torch.ones_like(row), None, None, False, 0.0, [True, True, True]
    )


def can_reconstruct(row: Float[Tensor, " out"]) -> bool:
    """Whether `fused_scaled_linear` applies: the sum can be reconstructed, and no transform surrounds the call."""
    return not in_transform_or_compile() and row.device.type == "cpu" and row.detach().abs().min().item() > MIN_SCALE


class _FusedScaledLinear(torch.autograd.Function):
    """Without a setup_context, like `_ScaleRows`."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        x: Tensor,
        lora_x: Tensor,
        w: Tensor | FrozenMatrix,
        row: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        y = frozen_product(x, w, bias)
        y = reference(y, row, bias, out=y)
        low = None
        if a is not None and b is not None:
            low = F.linear(lora_x, a)
            y.addmm_(low, (row[:, None] * b).T, alpha=scale)
        ctx.scale, ctx.quantized = scale, None if isinstance(w, Tensor) else w
        ctx.same_input = lora_x is x  # then x's gradient through A is part of x's
        saved_x, saved_lora_x = x if ctx.needs_input_grad[3] else None, None if low is None else lora_x
        saved_w = w if isinstance(w, Tensor) else None
        ctx.save_for_backward(saved_x, saved_lora_x, saved_w, row, bias, a, b, low, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, lora_x, w, row, bias, a, b, low, y = ctx.saved_tensors
        _, needs_x, needs_lora_x, needs_w, needs_row, needs_bias, needs_a, needs_b = ctx.needs_input_grad
        scaled_g, g_dot_y, g_sum = _gradients(g, y, row, bias, needs_row or needs_bias)
        dx = linear_input_grad(scaled_g, ctx.quantized if w is None else w) if needs_x else None
        d_lora_x, da, db = None, None, None
        if low is not None:
            if torch.is_grad_enabled():  # differentiated again: through the product that made it
                low = F.linear(lora_x, a)
            d_low = scaled_g @ (ctx.scale * b)
            if dx is not None and ctx.same_input:
                dx = dx.addmm_(d_low, a)
            elif needs_lora_x:
                d_lora_x = d_low @ a
            da = d_low.T @ lora_x if needs_a else None
            db = ctx.scale * (low.T @ scaled_g).T if needs_b else None  # twice to four times as fast as scaled_gᵀ low
        dw = scaled_g.T @ x if needs_w else None
        d_row = None if g_dot_y is None else g_dot_y / row
        return None, dx, d_lora_x, dw, d_row, g_sum if needs_bias else None, da, db


def fused_scaled_linear(
    x: Float[Tensor, "rows in"],
    lora_x: Float[Tensor, "rows in"],
    w: Float[Tensor, "out in"] | FrozenMatrix,
    row: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "rank in"] | None,
    b: Float[Tensor, "out rank"] | None,
    scale: float,
) -> Float[Tensor, "rows out"]:
    """The definition with A x̃ for A x, where `lora_x` is x̃, x after dropout; one tensor of the width of y is allocated
    in the forward and one in the backward. For plain autograd, if `can_reconstruct(row)`.
    """
    return _FusedScaledLinear.apply(scale, x, lora_x, w, row, bias, a, b)  # pyright: ignore[reportReturnType]
