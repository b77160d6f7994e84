"""A mask is a hash of seed and place."""

import pytest
import torch
from builders import close
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

import fgpt
from fgpt.kernels.dropout import dropout, dropout_mask


def fate(seed: int, i: int, j: int) -> int:
    """The hash of one element, in Python's integers: MurmurHash3's finalizer, over Weyl counters."""

    def finalize(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    row = finalize(((i + 1) * 0x9E3779B9 + finalize(seed)) % 2**32)
    column = finalize(((j + 1) * 0x9E3779B9 + finalize(seed ^ 0x5BD1E995)) % 2**32)
    return finalize((row + column) % 2**32)


@given(st.integers(0, 2**31 - 1), st.floats(0, 0.99))
def test_a_fate_is_a_hash_of_seed_and_place(seed: int, p: float):
    """Of nothing else: the mask is the same in every program, and on every machine."""
    limit = round(p * 2**32)
    signed = [[(fate(seed, i, j) + 2**31) % 2**32 for j in range(5)] for i in range(4)]
    expected = torch.tensor([[h >= limit for h in row] for row in signed])
    got = dropout_mask(torch.tensor(seed), 4, 5, p)
    assert torch.equal(got, expected)
    assert torch.equal(dropout_mask(torch.tensor(seed), 3, 2, p), expected[:3, :2])
    x = torch.randn(2, 2, 5, generator=fgpt.key(0))
    close(dropout(x, torch.tensor(seed), p), x * expected.view(2, 2, 5) / (1 - p), 1e-5, 1e-5)
    assert dropout(x.bfloat16(), torch.tensor(seed), p).dtype == torch.bfloat16


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_fates_are_independent(p: float):
    """At the given rate; and with no pattern of rows, columns, neighbors or neighboring seeds.

    A random 512 x 512 of unit variance has a largest singular value of 2 √512; any pattern adds one above it.
    """
    n = 512
    masks = [
        (dropout_mask(torch.tensor(seed), n, n, p).float() - (1 - p)) / (p * (1 - p)) ** 0.5
        for seed in (0, 1, 2, 1 << 30)
    ]
    for i, mask in enumerate(masks):
        assert mask.mean().abs() < 5 / n
        assert torch.linalg.matrix_norm(mask, 2) < 2.15 * n**0.5
        for other in [*masks[:i], mask.T, mask.roll(1, 0), mask.roll(1, 1), mask.roll((1, 1), (0, 1))]:
            assert (mask * other).mean().abs() < 5 * 2**0.5 / n  # each pair is twice in mask * mask.T


def test_dropout_under_transforms():
    x, seeds = torch.randn(3, 8, generator=fgpt.key(0)), torch.tensor([5, 6, 7])
    masks = torch.stack([dropout_mask(s, 3, 8, 0.5) for s in seeds])
    close(vmap(lambda s: dropout(x, s, 0.5))(seeds), x * masks * 2.0, 0)
    assert len({tuple(m.flatten().tolist()) for m in masks}) == 3
    close(vmap(grad(lambda x, s: dropout(x, s, 0.5).sum()), in_dims=(None, 0))(x, seeds), masks * 2.0, 0)
    rows = vmap(lambda x: dropout(x, seeds[0], 0.5))(x[:, None])  # one seed for all: each example has the same mask
    close(rows[:, 0], x * masks[0, 0] * 2.0, 0)
