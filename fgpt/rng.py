"""Random keys: a `torch.Generator` that is read and never advanced.

Two draws from one key are the same draw; different draws come from `fold_in(key, name)`, so that the order in which
things are initialised changes nothing.
"""

import hashlib

import torch


def key(seed: int) -> torch.Generator:
    """The key of an integer seed."""
    return torch.Generator().manual_seed(seed)


def fold_in(rng: torch.Generator, name: str | int) -> torch.Generator:
    """A fresh key, a function of `rng`'s seed and of `name` alone."""
    digest = hashlib.blake2b(f"{rng.initial_seed()}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(rng.device).manual_seed(int.from_bytes(digest, "little") >> 1)
