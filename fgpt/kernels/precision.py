"""The precision of what must not be rounded: statistics, softmax, losses, angles, sums of gradients."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32; an fp64 tensor stays as it is."""
    return x.to(wide(x.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 if `dtype` is."""
    return torch.promote_types(dtype, torch.float32)


def accumulates_in_half(x: Tensor) -> bool:
    """Whether torch's kernels of embedding and LayerNorm sum the gradients of weights in the half precision of `x`."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
