"""The precision of what must not be rounded: statistics, softmaxes, losses, angles."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is where it is in fp64."""
    return x.to(wide(x.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where `dtype` is."""
    return torch.promote_types(dtype, torch.float32)
