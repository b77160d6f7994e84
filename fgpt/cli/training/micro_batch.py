"""`--micro-batch-size auto`: the largest micro-batch that fits into a GPU's memory, at the same update."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from fgpt.cli.console import console
from fgpt.cli.devices import free_memory
from fgpt.errors import InputError
from fgpt.recipes import FineTuningRecipe

R = TypeVar("R", bound=FineTuningRecipe)

MARGIN = 0.9
"""The share of the free memory that a step may be expected to take: other rows have more positions with a loss, and
blocks of different sizes do not fit together without gaps.
"""


def with_largest_micro_batch(recipe: R, device: torch.device, probe: Callable[[int], None]) -> R:
    """The recipe with numbers in place of `auto`, and a line that says which.

    The number of rows in an update stays, and `RowOrder` gives it the same rows, so that the gradient is the same up to
    rounding. With dropout other activations are dropped.

    Args:
        recipe: One whose micro_batch_size is auto.
        device: Where it trains.
        probe: Takes a step with that many rows, and drops it.

    Raises:
        InputError: if not even one row fits, and on a device other than CUDA.
    """
    if device.type != "cuda":
        raise InputError(
            f"micro_batch_size auto measures the memory of a GPU, and the device is {device}: give a number"
        )
    with contextlib.suppress(torch.OutOfMemoryError):
        probe(1)  # what a first call allocates for good is not of the rows
    free = free_memory(device)

    def peak(rows: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        probe(rows)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    try:
        rows, per_row = largest_fit(recipe.rows_per_update, peak, round(MARGIN * free))
    finally:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the log's peak is that of the training
    count = recipe.rows_per_update // rows
    console.print(
        f"micro-batches of {rows} rows, {count} in an update (--micro-batch-size auto): a row takes "
        f"{per_row / 1e9:.2g} GB, and {free / 1e9:.3g} GB are free"
    )
    return replace(recipe, micro_batch_size=rows, grad_accumulation_steps=count)


def largest_fit(rows: int, peak: Callable[[int], int], budget: int) -> tuple[int, int]:
    """The largest divisor of `rows` whose step takes at most `budget` bytes, and the bytes of one more row.

    The peaks of one row and of two are measured, those of more extrapolated, and the choice is tried once; if memory is
    not enough after all, the next divisor of half the rows or less is tried.

    Raises InputError if not even one row fits.
    """
    try:
        one = peak(1)
    except torch.OutOfMemoryError:
        raise InputError(
            "not even one row fits into the memory of the GPU: lower --max-seq-len, or give --remat or --quantize nf4"
        ) from None
    try:
        per_row = max(1, peak(2) - one) if rows > 1 else one
    except torch.OutOfMemoryError:
        return 1, one
    limit = rows
    for n in reversed(_divisors(rows)):
        if n > limit or one + (n - 1) * per_row > budget:
            continue
        try:
            if n <= 2 or peak(n) <= budget:  # one and two have been tried
                return n, per_row
        except torch.OutOfMemoryError:
            pass
        limit = n // 2
    return 1, per_row


def _divisors(n: int) -> Sequence[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
