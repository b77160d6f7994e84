"""Random keys: a `torch.Generator` that is read and never advanced.

Two draws from one key are the same draw; different draws come from `fold_in(key, name)`, so that the order in which
things are initialized changes nothing. Where vmap or a compiler passes, a key is its `seed`: a number in a tensor.
Members that are to draw each their own are given each their own seed: `fold_in(key, i)`, with i mapped over.
"""

import hashlib
from typing import overload

import torch
from jaxtyping import Int
from torch import Tensor


def key(seed: int) -> torch.Generator:
    """The key of an integer seed."""
    return torch.Generator().manual_seed(seed)


@overload
def fold_in(rng: torch.Generator, name: str | int) -> torch.Generator: ...
@overload
def fold_in(rng: torch.Generator | Int[Tensor, ""], name: Int[Tensor, ""]) -> Int[Tensor, ""]: ...
@overload
def fold_in(rng: Int[Tensor, ""], name: str | int | Int[Tensor, ""]) -> Int[Tensor, ""]: ...
def fold_in(
    rng: torch.Generator | Int[Tensor, ""], name: str | int | Int[Tensor, ""]
) -> torch.Generator | Int[Tensor, ""]:
    """A fresh key, a function of `rng`'s seed and of `name` alone: a seed where either is a tensor, which vmap may map.

    Source: for tensors Appleby's MurmurHash3, its finalizer.
    """
    if isinstance(rng, Tensor) or isinstance(name, Tensor):
        name = salt(name) if isinstance(name, str) else name
        return _mixed(_mixed(seed_tensor(rng)) + name) & 0x7FFFFFFF
    digest = hashlib.blake2b(f"{rng.initial_seed()}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(rng.device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _mixed(x: Int[Tensor, ""]) -> Int[Tensor, ""]:
    """32 bits of which each depends on all of the low 32 of x, one to one."""
    x = x.long() & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def seed_tensor(rng: torch.Generator | Int[Tensor, ""]) -> Int[Tensor, ""]:
    """The key as 31 bits in a tensor: what can be mapped over, and changes without compiling anew. A seed stays."""
    if isinstance(rng, Tensor):
        return rng
    return torch.tensor(fold_in(rng, "seed").initial_seed() & 0x7FFFFFFF)


def fold_in_seed(seed: Int[Tensor, ""], name: str) -> Int[Tensor, ""]:
    """`fold_in` for a seed."""
    return seed ^ salt(name)


def salt(name: str) -> int:
    """31 bits that stand for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") >> 1


# What torch.compiler.assume_constant_result sets, without importing the compiler: a name's hash is never traced.
salt._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
