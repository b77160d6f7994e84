"""Positions of weight 0 beside those of the loss change nothing of it, and make batches of few shapes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import close, tiny, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad

import fgpt
from fgpt.losses import pad_loss_positions
from fgpt.tree import astype

BASE = astype(tiny(n_layer=1), torch.float64)
ADAPTERS: Any = astype(fgpt.lora(BASE, fgpt.key(0), 2), torch.float64)


def batch(rows: int, width: int, share: float, seed: int) -> fgpt.Batch:
    x, rng = tokens(31, rows, width, seed=seed), fgpt.key(seed)
    weights = (torch.rand(rows, width, generator=rng, dtype=torch.float64) < share) * (0.5 + x / 31)
    return fgpt.Batch(x, x.roll(-1), weights, loss_positions=weights.flatten().nonzero().flatten())


def loss(adapters: Any, rows: fgpt.Batch) -> Tensor:
    return fgpt.nll(fgpt.adapt(BASE, adapters), rows)[0]


@given(
    st.lists(st.tuples(st.integers(1, 3), st.floats(0, 1), st.integers(0, 99)), min_size=1, max_size=3),
    st.integers(2, 9),
    st.integers(1, 8),
)
def test_the_loss_stays_the_same(sizes: list[tuple[int, float, int]], width: int, parts: int):
    batches = [batch(rows, width, share, seed) for rows, share, seed in sizes]
    padded = pad_loss_positions(batches, parts)
    shares = set()
    for x, y in zip(batches, padded, strict=True):
        assert x.loss_positions is not None
        assert y.loss_positions is not None
        flat, number = x.weights.flatten(), len(y.loss_positions)
        assert set(x.loss_positions.tolist()) <= set(y.loss_positions.tolist())
        assert flat[y.loss_positions].count_nonzero() == len(x.loss_positions)
        assert len(set(y.loss_positions.tolist())) == number
        part = min((part for part in range(parts + 1) if number == -(-part * flat.numel() // parts)), default=None)
        shares.add(part)
        if len(x.loss_positions):
            close(loss(ADAPTERS, y), loss(ADAPTERS, x), 1e-12)
            close(grad(loss)(ADAPTERS, y), grad(loss)(ADAPTERS, x), 1e-12)
    most = max(len(x.loss_positions) / x.weights.numel() for x in batches if x.loss_positions is not None)
    longest = max(len(y.loss_positions) / y.weights.numel() for y in padded if y.loss_positions is not None)
    assert None not in shares
    assert most <= longest < most + 1 / parts + 1 / width


def test_a_position_comes_once():
    """Its queries would have the gradient of both for each: what counts twice has twice the weight."""
    text, weights = tokens(31, 2, 9), torch.ones(2, 9, dtype=torch.float64)
    for positions, repeated in (([2, 2, 4], 2), ([5, 17, 0, 5], 5)):
        with pytest.raises(fgpt.InputError, match=f"expected distinct loss_positions, got {repeated} twice"):
            loss(ADAPTERS, fgpt.Batch(text, text, weights, loss_positions=torch.tensor(positions)))
    in_any_order = torch.tensor([17, 3, 0])
    rows = fgpt.Batch(text, text, weights, loss_positions=in_any_order)
    dense = replace(rows, weights=torch.zeros(18, dtype=torch.float64).index_fill(0, in_any_order, 1.0).view(2, 9))
    close(grad(loss)(ADAPTERS, rows), grad(loss)(ADAPTERS, replace(dense, loss_positions=None)), 1e-12)


def test_batches_without_them_stay_as_they_are():
    rows = replace(batch(2, 8, 0.5, 0), loss_positions=None)
    assert pad_loss_positions([rows])[0] is rows
