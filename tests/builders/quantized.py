"""Formats of quantized matrices, and random matrices."""

from typing import get_args

import torch
from torch import Tensor

import fgpt
from fgpt.kernels.quantized_linear import (
    Format,
)

FORMATS: tuple[Format, ...] = get_args(Format)


def signs(size: int) -> torch.Tensor:
    """Hadamard's matrix of ±1: (-1) to the number of bits that i and j share.

    Source: Sylvester 1867.
    """
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


def normal_matrix(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=fgpt.key(seed)).to(dtype)
