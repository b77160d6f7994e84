"""A fused kernel with one backward, if that backward is itself differentiated: the definition's backward stands in.

Whether it will be, no forward can know: plain autograd tells in the backward (create_graph=True), and the weight of a
loss, which is differentiated without being an operand, is seen in the cotangent.

It wraps the result of a kernel: `attention` and `layer_norm` use it. Without such derivatives its backward passes the
cotangent on to the kernel's own; vmap applies to both.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgpt.kernels.functorch_state import (
    cotangents_are_differentiated,
    is_recordable,
    is_recorded_by_autograd,
    is_weightable,
)


class _Recordable(torch.autograd.Function):
    """(definition, y, x_1, x_2, ...) -> y, the fused kernel's result of the x's."""

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
        if not (is_recorded_by_autograd(*xs) or cotangents_are_differentiated(g)):
            return None, g, *(None for _ in xs)

        def definition(*needed: Tensor) -> Tensor:
            rest = iter(needed)
            return ctx.definition(*(next(rest) if need else x for x, need in zip(xs, needs, strict=True)))

        needed = [x for x, need in zip(xs, needs, strict=True) if need]
        grads = iter(torch.func.vjp(definition, *needed)[1](g) if needed else ())
        return None, None, *(next(grads) if need else None for need in needs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, definition: Callable[..., Tensor], y: Tensor, *xs: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The result is what it is, with the mapped axis in front, and so is its definition's."""
        mapped = torch.func.vmap(definition, in_dims=tuple(in_dims[2:]))
        y = y.expand(info.batch_size, *y.shape) if in_dims[1] is None else y.movedim(in_dims[1], 0)
        return _Recordable.apply(mapped, y, *xs), 0


def with_every_derivative(
    definition: Callable[..., Tensor], y: Tensor, *xs: Tensor | None, second: bool = False
) -> Tensor:
    """The result of a fused kernel with that kernel's backward; and with its definition's, if the backward is
    differentiated again.

    Args:
        definition: The reference, a function of the operands.
        y: definition(*xs), computed by the kernel.
        xs: The operands.
        second: The kernel has a second backward of its own, which serves torch.func.grad as it is.
    """
    if is_recordable(*xs) or (not second and is_weightable(*xs)):
        return _Recordable.apply(definition, y, *xs)  # pyright: ignore[reportReturnType]
    return y
