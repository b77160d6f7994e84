"""How many members are trained at once: as many as fit into memory, by measuring one and two."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from fgpt.cli.devices import free_memory, peak_memory
from fgpt.errors import InputError

MARGIN = 0.8
"""The share of the free memory that members may be expected to take: other batches have longer rows."""


def members_that_fit(count: int, take_step: Callable[[int], None], device: torch.device) -> int:
    """The most members, at most `count`, whose step fits into memory.

    Args:
        count: How many there are.
        take_step: Takes the step of so many members, and drops it.
        device: Where it is taken.

    Raises:
        InputError: if not even one fits.
    """
    if count == 1:
        return 1
    free, before = free_memory(device) // _sharing(device), _in_use(device)
    try:
        one = _peak(lambda: take_step(1), device) - before
    except torch.OutOfMemoryError:
        raise InputError(
            "not even one member fits into memory: lower --max-seq-len or --micro-batch-size, give --remat, or give "
            "--quantize nf4"
        ) from None
    if one > free:
        raise InputError(
            f"one member takes {one / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free: lower --max-seq-len or "
            "--micro-batch-size, or give --remat"
        )
    try:
        both = _peak(lambda: take_step(2), device) - before
    except torch.OutOfMemoryError:
        return 1
    each = max(1, both - one)
    return max(1, min(count, 1 + int((MARGIN * free - one) / each)))


def _sharing(device: torch.device) -> int:
    """The processes of this sweep that share the memory of a device: each has a GPU of its own."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _peak(take_step: Callable[[], None], device: torch.device) -> int:
    """The most bytes in use during a step."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        take_step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux begins the process's peak anew
    take_step()
    return _status("VmHWM") or peak_memory(device)


def _in_use(device: torch.device) -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _status(name: str) -> int:
    """Bytes of memory that Linux reports of this process; elsewhere 0."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
