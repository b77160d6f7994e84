"""Dropout and noise as functions of a seed: what an element draws is a hash of the seed and of the element's indices.

A torch.Generator has a state that vmap, torch.compile and a recomputed forward would each have to carry; a hash has
none, so the draw is the same wherever and however often it is computed. The hash is in 32-bit arithmetic that wraps:
one for rows and one for columns, combined by a finalizer with full avalanche. Compiled for a CPU it becomes C++, which
assumes that no signed sum wraps, and then gives other draws: there it is in 64 bits, wrapped after each one.

It is plain torch, so every transform and the compiler pass; under vmap a mapped seed gives each member draws of its
own, and one seed gives all of them the same.

Source: Srivastava et al. 2014, section 4; the counter-based idea is Salmon et al. 2011, the finalizer MurmurHash3's.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_A, _B, _GOLDEN = -2048144789, -1028477387, -1640531527  # 0x85ebca6b, 0xc2b2ae35, 0x9e3779b9 as signed 32 bits


def _wrap(h: Int[Tensor, "*size"]) -> Int[Tensor, "*size"]:
    """The sum or product of 32 bits, as 32 bits with a sign."""
    return h if h.dtype == torch.int32 else (h + 2**31 & 0xFFFFFFFF) - 2**31


def _finalize(h: Int[Tensor, "*size"]) -> Int[Tensor, "*size"]:
    h = _wrap((h ^ (h >> 16 & 0xFFFF)) * _A)
    h = _wrap((h ^ (h >> 13 & 0x7FFFF)) * _B)
    return h ^ (h >> 16 & 0xFFFF)


def random_bits(seed: Int[Tensor, ""], rows: int, columns: int, first_column: int = 0) -> Int[Tensor, "rows columns"]:
    """Integers of 32 bits with a sign, uniform and independent, decided by `seed`: those of a table without end to the
    right, from `first_column` on.
    """
    becomes_cpp = torch.compiler.is_compiling() and seed.device.type == "cpu"
    dtype = torch.int64 if becomes_cpp else torch.int32

    def hashes(n: int, salt: int, first: int = 0) -> Tensor:
        counter = torch.arange(first + 1, first + n + 1, dtype=dtype, device=seed.device)
        return _finalize(_wrap(counter * _GOLDEN + _finalize(_wrap((seed ^ salt).to(dtype)))))

    return _finalize(_wrap(hashes(rows, 0)[:, None] + hashes(columns, 0x5BD1E995, first_column)[None, :]))


def dropout_mask(seed: Int[Tensor, ""], rows: int, columns: int, p: float) -> Bool[Tensor, "rows columns"]:
    """True with probability 1 - p, independently for each element, decided by `seed`."""
    return random_bits(seed, rows, columns) >= round(p * 2**32) - 2**31


def uniform_noise(seed: Int[Tensor, ""], rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """Uniform in [-1, 1] in fp32, independently for each element, decided by `seed`."""
    return random_bits(seed, rows, columns).float() * 2**-31


def normal_noise(seed: Int[Tensor, ""], count: int, first: int = 0) -> Float[Tensor, " count"]:
    """Standard normal numbers in fp32, decided by `seed`: those of a sequence without end, from number `first` on.

        √(-2 log u) · (cos 2πv, sin 2πv)        u, v uniform in (0, 1]; a pair makes two numbers

    u is 2⁻³³ or more, so that no number is above 6.8, as one in 10¹¹ should be.

    Source: Box and Muller 1958.
    """
    begin, end = first // 2, (first + count + 1) // 2
    bits = random_bits(seed, 2, end - begin, begin).long() + 2**31
    u, v = ((bits.float() + 0.5) * 2**-32).unbind()
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten()[first - 2 * begin :][:count]


def dropout(x: Float[Tensor, "*batch in"], seed: Int[Tensor, ""] | None, p: float) -> Float[Tensor, "*batch in"]:
    """x with each element zeroed with probability p, and divided by 1 - p otherwise; without a seed, x itself."""
    if seed is None:
        return x
    keep = dropout_mask(seed.to(x.device), x[..., 0].numel(), x.shape[-1], p).view(x.shape)
    return x * (keep / (1 - p)).to(x.dtype)
