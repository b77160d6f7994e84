"""Random keys: a `torch.Generator` that is read and never advanced.

Two draws from one key are the same draw; different draws come from `fold_in(key, name)`, so that the order in which
things are initialized changes nothing. Under vmap or a compiler a key is its seed, an integer tensor. For different
draws in each member of a vmap map over i in `fold_in(key, i)`.
"""

import hashlib
from typing import overload

import torch
from jaxtyping import Int
from torch import Tensor


def key(seed: int) -> torch.Generator:
    """The key of an integer seed.

    >>> key(0).initial_seed()
    0
    """
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
    """A fresh key, a function of `rng`'s seed and of `name` alone. If either is a tensor, which vmap may map over, the
    result is a seed tensor.

    Source: for tensors the finalizer of Appleby's MurmurHash3.

    >>> fold_in(key(0), "dropout").initial_seed() == fold_in(key(0), "dropout").initial_seed()
    True
    >>> fold_in(key(0), "dropout").initial_seed() == fold_in(key(0), "order").initial_seed()
    False
    """
    if isinstance(rng, Tensor) or isinstance(name, Tensor):
        where = rng.device if isinstance(rng, Tensor) or not isinstance(name, Tensor) else name.device
        name = hash_name(name) if isinstance(name, str) else name
        return _mix(_mix(seed_tensor(rng, where)) + name) & 0x7FFFFFFF
    digest = hashlib.blake2b(f"{rng.initial_seed()}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(rng.device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _mix(x: Int[Tensor, ""]) -> Int[Tensor, ""]:
    """A one-to-one function of the low 32 bits of x, of which every bit of the result depends on every bit."""
    x = x.long() & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def seed_tensor(rng: torch.Generator | Int[Tensor, ""], device: torch.device | None = None) -> Int[Tensor, ""]:
    """The key as 31 bits in a tensor, which can be mapped over and changes without recompilation. A seed stays itself.

    Args:
        rng: A key or its seed.
        device: Where the seed goes. None leaves a seed where it is, and puts that of a key on the CPU.

    >>> seed_tensor(key(0)).dtype
    torch.int64
    """
    if isinstance(rng, Tensor):
        return rng if device is None else rng.to(device)
    seed = fold_in(rng, "seed").initial_seed() & 0x7FFFFFFF
    return torch.full((), seed, dtype=torch.int64, device=device)  # a kernel writes it there: nothing is copied


def fold_in_seed(seed: Int[Tensor, ""], name: str) -> Int[Tensor, ""]:
    """`fold_in` for a seed, by the name's hash alone."""
    return seed ^ hash_name(name)


def hash_name(name: str) -> int:
    """The name as 31 bits."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") >> 1


# What torch.compiler.assume_constant_result sets, without importing the compiler: a name's hash is never traced.
hash_name._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
