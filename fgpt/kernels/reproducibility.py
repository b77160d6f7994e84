"""Whether equal computations give equal bits."""

import torch


def bitwise_reproducible(device: torch.device) -> bool:
    """Whether a step that is computed twice on this device gives the same bits.

    On a CPU each sum has a fixed order, for a number of threads. On a GPU the backward of attention, and of what is
    read by index, adds with atomic operations, in the order in which they arrive, unless torch's deterministic
    algorithms are in use.
    """
    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
