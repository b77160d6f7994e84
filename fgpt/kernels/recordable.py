"""A fused kernel with one backward, where that backward is itself to be differentiated: the definition's stands in.

Whether it will be, no forward can know: plain autograd says so in the backward (create_graph=True), and what is
followed beside the operands, as a weight of the loss is, says so by the gradient that comes in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgpt.kernels.functorch_state import followed_beside, is_recordable, is_recorded_by_autograd, weightable


class _Recordable(torch.autograd.Function):
    """(definition, y, x_1, x_2, ...) -> y, the fused kernel's result of the x's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(definition: Callable[..., Tensor], y: Tensor, *xs: Tensor | None) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.definition = inputs[0]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        xs, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if not (is_recorded_by_autograd(*xs) or followed_beside(g)):
            return None, g, *(None for _ in xs)

        def definition(*needed: Tensor) -> Tensor:
            rest = iter(needed)
            return ctx.definition(*(next(rest) if need else x for x, need in zip(xs, needs, strict=True)))

        needed = [x for x, need in zip(xs, needs, strict=True) if need]
        found = iter(torch.func.vjp(definition, *needed)[1](g) if needed else ())
        return None, None, *(next(found) if need else None for need in needs)


def with_every_derivative(
    definition: Callable[..., Tensor], y: Tensor, *xs: Tensor | None, second: bool = False
) -> Tensor:
    """`y`, which is definition(*xs) by a fused kernel, with that kernel's backward where once is enough, and the
    definition's where it is differentiated again. A kernel with a `second` backward of its own serves torch.func.grad
    as it is.
    """
    if is_recordable(*xs) or (not second and weightable(*xs)):
        return _Recordable.apply(definition, y, *xs)  # pyright: ignore[reportReturnType]
    return y
