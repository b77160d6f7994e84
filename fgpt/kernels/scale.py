"""Components scaled each by its own factor, as DoRA and IA3 scale what a matrix gives.

As wide as an activation and as cheap as reading it, so that what it costs is memory: the backward here makes one tensor
of that width where autograd makes two.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.transforms import transformed


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, row: Tensor, shift: Tensor | None) -> Tensor:
        return y * row if shift is None else torch.addcmul(shift, y, row)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, row = ctx.saved_tensors
        _, by_row, by_shift = ctx.needs_input_grad
        room = g * y if by_row else None
        down = None if room is None else room.flatten(0, -2).sum(0)
        if torch.is_grad_enabled():  # a second backward will want the products themselves
            room = None
        return torch.mul(g, row, out=room), down, g.flatten(0, -2).sum(0) if by_shift else None


def scaled(
    y: Float[Tensor, "*batch out"], row: Float[Tensor, " out"], shift: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """row ⊙ y + shift."""
    if transformed():
        return y * row if shift is None else torch.addcmul(shift, y, row)
    return _Scaled.apply(y, row, shift)  # pyright: ignore[reportReturnType]
