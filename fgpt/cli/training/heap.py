"""How the C library treats memory between the steps of a training."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""glibc's names in malloc.h, M_ before them."""


def keep_freed_memory() -> None:
    """Keep what a step frees for the next one. As it comes, glibc gives the top of the heap back to the system as a
    backward lets go of activations, and maps a block of over 32 MB anew each time; the next step then faults every page
    of them in again. Without that, on 2 virtual cores, a LoRA step of GPT-2 small's shape takes 1 % less, a DoRA's 4 %.
    Peaks stay as they were.

    Where the C library is another, nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(MMAP_MAX, 0)
