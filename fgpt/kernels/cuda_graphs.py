"""Whether a CUDA graph captures what is computed.

A graph repeats its kernels on the tensors of the capture. What Python computes, and what stays on the CPU, is frozen in
it: a learning rate, the seed of a dropout.
"""

import torch


def is_capturing() -> bool:
    """Whether a CUDA graph is captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
