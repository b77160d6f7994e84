"""Arithmetic over the leaves of a tree, as lists: one kernel for many leaves instead of one for each.

x_i + y_i        x_i / s        Σ_i ‖x_i‖²

reference     the same leaf by leaf
fast path     torch._foreach_*, out of place, to the bit the reference on a CPU; the norm joins leaves and sums
transforms    vmap has no rule for torch._foreach_*, so under transforms, derivatives and compilation the reference
              runs; the norm is plain torch, and every transform passes
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.functorch_state import is_undisturbed
from fgpt.kernels.precision import at_least_fp32, wide

foreach: Any = torch
"""Where torch._foreach_* are: torch's stubs do not export them."""

GROUP_BYTES = 1 << 24
"""Of the leaves that are computed together: what the temporaries of a group add to the peak of memory."""


def groups(xs: Sequence[Tensor], kinds: Sequence[Hashable]) -> Iterator[list[int]]:
    """The indices of `xs` in groups of one kind and of at most GROUP_BYTES; a larger leaf is a group of its own."""
    open_groups: dict[Hashable, list[int]] = {}
    sizes: dict[Hashable, int] = {}
    for i, (x, kind) in enumerate(zip(xs, kinds, strict=True)):
        size = x.numel() * x.element_size()
        if kind in open_groups and sizes[kind] + size > GROUP_BYTES:
            yield open_groups.pop(kind)
        open_groups.setdefault(kind, []).append(i)
        sizes[kind] = size if len(open_groups[kind]) == 1 else sizes[kind] + size
    yield from open_groups.values()


def add(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Sequence[Tensor]:
    """x_i + y_i."""
    if is_undisturbed(*xs, *ys):
        return foreach._foreach_add(xs, ys)
    return [x + y for x, y in zip(xs, ys, strict=True)]


def divide(xs: Sequence[Tensor], by: Float[Tensor, ""]) -> Sequence[Tensor]:
    """x_i / by, in the dtype of x_i."""
    if not is_undisturbed(by, *xs):
        return [x / _as_divisor(by, x.dtype) for x in xs]
    result = list(xs)
    for dtype in dict.fromkeys(x.dtype for x in xs):
        indices = [i for i, x in enumerate(xs) if x.dtype == dtype]
        quotients = foreach._foreach_div([xs[i] for i in indices], _as_divisor(by, dtype))
        for i, x in zip(indices, quotients, strict=True):
            result[i] = x
    return result


def _as_divisor(by: Float[Tensor, ""], dtype: torch.dtype) -> Float[Tensor, ""]:
    """In the dtype of the leaves, which CUDA's kernels of lists require; for half precision it is not rounded."""
    return by.to(wide(dtype))


def square_norm(xs: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Σ_i ‖x_i‖², at least in fp32.

    Leaves are joined before they are summed: torch._foreach_norm is as fast on CUDA, but on a CPU it adds 8 partial
    sums in fp32, off by 2e-3 for 38M elements, where a sum is off by 5e-8.
    """
    sums: list[Tensor] = []
    for indices in groups(xs, [x.dtype for x in xs]):
        group = [xs[i] for i in indices]
        joined = group[0] if len(group) == 1 else torch.cat([x.reshape(-1) for x in group])
        sums.append(at_least_fp32(joined).square().sum())
    return torch.stack(sums).sum()
