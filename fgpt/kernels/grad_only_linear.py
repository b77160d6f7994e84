"""A product y = x Wᵀ that is differentiated, and whose value nobody reads: the last of a block that is run again for
its gradient. Linear in x and in W, it needs for that no value of its own:

    x̄ = ȳ W        W̄ = ȳᵀ x
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.quantized_linear import Quantized, linear_input_grad


class _Unread(torch.autograd.Function):
    """Without a setup_context: no transform ever meets it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | Quantized) -> Tensor:
        ctx.quantized = None if isinstance(w, Tensor) else w
        # x is kept for a W that is trained, and for no other: it is as wide as the inner layer of an MLP
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if isinstance(w, Tensor) else None)
        return x.new_zeros(()).expand(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        by_x, by_w = ctx.needs_input_grad
        to_w = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]) if by_w else None
        if not by_x:
            return None, to_w
        return linear_input_grad(g, ctx.quantized if w is None else w), to_w


def grad_only_linear(x: Float[Tensor, "*batch in"], w: Tensor | Quantized) -> Float[Tensor, "*batch out"]:
    """Zeros of the shape of x Wᵀ, in the room of one number, with its gradient. For plain autograd, once."""
    return _Unread.apply(x, w)  # pyright: ignore[reportReturnType]
