"""A rotation of the rows of a matrix by blocks of their elements:

    rotate(x) = x R        R = diag(H, H, ..)        H Hᵀ = 1, Hᵀ = H

with H Sylvester's Hadamard matrix of a power of two, divided by its square root. Each element of x R is a sum over a
block of x with signs, and so an outlier of x is spread over its block. A second rotation undoes the first.

    reference     a product with the whole of R
    fast path     a product of the blocks with H; in bf16 for what is rounded to 8 bits anyway
    transforms    plain torch, linear in x: every one

Source: Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", section 3; Sylvester 1867.
"""

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.functorch_state import in_transform_or_compile

MAX_BLOCK = 64
"""The largest block: its product is still limited by memory bandwidth."""
MIN_BLOCK = 8
"""The smallest block that is worth a rotation."""


def hadamard_block(width: int) -> int | None:
    """The block for rows of `width` elements: the largest power of two up to MAX_BLOCK that divides it; None if that is
    below MIN_BLOCK.

    >>> [hadamard_block(width) for width in (768, 576, 80, 100)]
    [64, 64, 16, None]
    """
    block = min(width & -width, MAX_BLOCK)
    return block if block >= MIN_BLOCK else None


def reference(x: Float[Tensor, "*batch in"], block: int) -> Float[Tensor, "*batch in"]:
    """The definition."""
    return x @ torch.block_diag(*[hadamard_matrix(block).to(x.dtype)] * (x.shape[-1] // block))


def rotate(x: Float[Tensor, "*batch in"], block: int, dtype: torch.dtype | None = None) -> Float[Tensor, "*batch in"]:
    """x R, computed in `dtype` and in the dtype of x.

    >>> rotate(torch.tensor([[8.0, 0.0, 0.0, 0.0]]), block=4)
    tensor([[4., 4., 4., 4.]])
    """
    h = _matrix(block, x.device, dtype or x.dtype)
    return (x.to(h.dtype).unflatten(-1, (-1, block)) @ h).flatten(-2).to(x.dtype)


def hadamard_matrix(block: int) -> Float[Tensor, "block block"]:
    """H, of ±1 / √block.

    >>> hadamard_matrix(4) * 2
    tensor([[ 1.,  1.,  1.,  1.],
            [ 1., -1.,  1., -1.],
            [ 1.,  1., -1., -1.],
            [ 1., -1., -1.,  1.]], dtype=torch.float64)
    """
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / block**0.5


def _matrix(block: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "block block"]:
    """H where x is."""
    if torch.compiler.is_compiling():  # it traces what a cache would hide, and warns
        return hadamard_matrix(block).to(device, dtype)
    if in_transform_or_compile():  # a copy made here belongs to the transform and must not outlive it in a cache
        return _cached(block).to(device, dtype)
    return _cached_on(block, device, dtype)


@functools.cache
def _cached(block: int) -> Float[Tensor, "block block"]:
    with torch.inference_mode(False):
        return hadamard_matrix(block)


@functools.cache
def _cached_on(block: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "block block"]:
    with torch.inference_mode(False):
        return hadamard_matrix(block).to(device, dtype)
