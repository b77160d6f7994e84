"""How much of a matrix is expanded at once, by device: a CPU is fastest while a chunk stays in its cache, a GPU if each
kernel has much to do.
"""

import torch

ON_A_GPU = 1 << 26
"""Elements, 256 MB of fp32: a matrix of any layer of an 8B model whole."""


def chunk_size(device: torch.device, on_cpu: int) -> int:
    """Elements to expand at once; `on_cpu` is what a kernel has measured to be best there."""
    return on_cpu if device.type == "cpu" else ON_A_GPU
