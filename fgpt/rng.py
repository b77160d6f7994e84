"""Random keys: a `torch.Generator` that is read and never advanced.

Two draws from one key are the same draw; different draws come from `fold_in(key, name)`, so that the order in which
things are initialised changes nothing. Where vmap or a compiler passes, a key is its `seed`: a number in a tensor.
"""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor


def key(seed: int) -> torch.Generator:
    """The key of an integer seed."""
    return torch.Generator().manual_seed(seed)


def fold_in(rng: torch.Generator, name: str | int) -> torch.Generator:
    """A fresh key, a function of `rng`'s seed and of `name` alone."""
    digest = hashlib.blake2b(f"{rng.initial_seed()}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(rng.device).manual_seed(int.from_bytes(digest, "little") >> 1)


def seed(rng: torch.Generator) -> Int[Tensor, ""]:
    """The key as 31 bits in a tensor: what can be mapped over, and changes without compiling anew."""
    return torch.tensor(fold_in(rng, "seed").initial_seed() & 0x7FFFFFFF)


def fold_in_seed(seed: Int[Tensor, ""], name: str) -> Int[Tensor, ""]:
    """`fold_in` for a seed."""
    return seed ^ salt(name)


def salt(name: str) -> int:
    """31 bits that stand for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") >> 1


# What torch.compiler.assume_constant_result sets, without importing the compiler: a name's hash is never traced.
salt._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
