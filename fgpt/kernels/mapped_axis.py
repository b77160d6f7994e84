"""The mapped axis of a vmap as part of an operand's first one, for kernels that compute all examples in one call."""

from collections.abc import Sequence

from torch import Tensor


def fold(size: int, in_dims: Sequence[int | None], operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The operands with the mapped axis as part of the first one; what is not mapped is repeated.

    Args:
        size: Of the mapped axis.
        in_dims: Where each operand has it; None is nowhere.
        operands: Tensors; None stays None.
    """
    folded: list[Tensor | None] = []
    for x, axis in zip(operands, in_dims, strict=True):
        if x is not None:
            x = (x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)).flatten(0, 1)
        folded.append(x)
    return folded


def unfold(size: int, outputs: Sequence[Tensor | None]) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """The outputs with the mapped axis apart again, and where it is: what a `vmap` of an autograd.Function returns."""
    unfolded = tuple(None if x is None else x.unflatten(0, (size, -1)) for x in outputs)
    return unfolded, tuple(None if x is None else 0 for x in outputs)
