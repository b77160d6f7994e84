"""Formats of quantized matrices, and random matrices."""

from typing import get_args

import torch
from torch import Tensor

import fgpt
from fgpt.kernels.quantized_linear import (
    Format,
)

FORMATS: tuple[Format, ...] = get_args(Format)


def normal_matrix(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=fgpt.key(seed)).to(dtype)
