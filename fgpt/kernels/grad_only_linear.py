"""A product y = x Wᵀ that is differentiated and whose value nobody reads: the last product of a block that is
recomputed for its gradient. It is linear in x and in W, so its gradient needs no value of its own:

    x̄ = ȳ W        W̄ = ȳᵀ x

    reference     x Wᵀ minus its detached value
    fast path     zeros, and the products of the backward pass
    transforms    none: `remat` puts the node into a recomputed block under plain autograd alone
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.quantized_linear import FrozenMatrix, linear_input_grad
from fgpt.tree import node


@node
class GradOnly:
    """A base weight whose product is wanted for its gradient alone, by plain autograd: the product itself is 0."""

    base: Float[Tensor, "out in"] | FrozenMatrix

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype


def reference(x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"]) -> Float[Tensor, "*batch out"]:
    """The definition: zeros with the gradient of x Wᵀ."""
    y = x @ w.T
    return y - y.detach()


class _GradOnlyLinear(torch.autograd.Function):
    """Without a setup_context: no transform ever meets it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | FrozenMatrix) -> Tensor:
        ctx.quantized = None if isinstance(w, Tensor) else w
        # x is saved only for a W that is trained: it is as wide as the inner layer of an MLP
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if isinstance(w, Tensor) else None)
        return x.new_zeros(()).expand(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad
        dw = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]) if needs_w else None
        return linear_input_grad(g, ctx.quantized if w is None else w) if needs_x else None, dw


def grad_only_linear(
    x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"] | FrozenMatrix
) -> Float[Tensor, "*batch out"]:
    """Zeros of the shape of x Wᵀ, one element expanded, with the gradient of x Wᵀ. For plain autograd, once."""
    return _GradOnlyLinear.apply(x, w)  # pyright: ignore[reportReturnType]
