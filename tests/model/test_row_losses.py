"""`nll(.., per_example=True)` gives of each row what it gives of the row alone, and so do its gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import close, tiny, with_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

import fgpt
from fgpt.data.examples import Example, Span
from fgpt.data.packing import collate
from fgpt.sweeps import stack_batches
from fgpt.tree import astype, tree_map

BASE = astype(tiny(n_layer=1), torch.float64)
ADAPTERS: Any = astype(with_noise(fgpt.lora(BASE, fgpt.key(0), 2), 0.1), torch.float64)
SIZES = st.lists(st.lists(st.integers(2, 6), min_size=1, max_size=3), min_size=1, max_size=4)
"""Of each row, the tokens of the examples that are packed into it."""


def packed_rows(sizes: list[list[int]], seed: int) -> list[list[Example]]:
    """Some spans have weight 0, and so may a whole row."""
    rng, rows = torch.Generator().manual_seed(seed), []
    for lengths in sizes:
        row = []
        for length in lengths:
            tokens = tuple(torch.randint(31, (length,), generator=rng).tolist())
            weight = float(torch.randint(3, (), generator=rng)) / 2
            row.append(Example(tokens, (Span(int(torch.randint(length, (), generator=rng)), length, weight),)))
        rows.append(row)
    return rows


def sums(adapters: Any, batch: fgpt.Batch) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(BASE, adapters), batch, per_example=True)


def total(adapters: Any, batch: fgpt.Batch) -> Tensor:
    return fgpt.nll(fgpt.adapt(BASE, adapters), batch)[0]


@pytest.mark.slow
@settings(max_examples=25)
@given(SIZES, st.booleans(), st.integers(0, 99))
def test_each_row_as_if_alone(sizes: list[list[int]], everywhere: bool, seed: int):
    rows = packed_rows(sizes, seed)
    batch = astype(collate(rows), torch.float64)
    batch = replace(batch, loss_positions=None) if everywhere else batch
    alone = [astype(collate([row]), torch.float64) for row in rows]
    losses, weights = sums(ADAPTERS, batch)
    close(losses, torch.stack([total(ADAPTERS, row) for row in alone]), 1e-12)
    assert weights.tolist() == [float(row.weights.sum()) for row in alone]
    factors = torch.randn(len(rows), generator=fgpt.key(seed), dtype=torch.float64)
    got = grad(lambda adapters: (factors * sums(adapters, batch)[0]).sum())(ADAPTERS)
    parts = [tree_map(lambda x, f=f: f * x, grad(total)(ADAPTERS, row)) for f, row in zip(factors, alone, strict=True)]
    close(got, tree_map(lambda *xs: sum(xs), *parts), 1e-11)


def test_rows_of_several_axes_and_of_members():
    """A batch of any axes; and under vmap over batches, adapters or both."""
    rows = packed_rows([[4], [3], [2], [4], [4], [3]], seed=1)
    flat = astype(collate(rows), torch.float64)
    for positions in (None, flat.loss_positions):
        batch = replace(flat, loss_positions=positions)
        grids = {name: getattr(batch, name).view(2, 3, -1) for name in ("tokens", "targets", "weights")}
        losses, weights = sums(ADAPTERS, replace(batch, **grids))
        assert losses.shape == weights.shape == (2, 3)
        close(losses.flatten(), sums(ADAPTERS, batch)[0], 1e-12)
    many = [with_noise(ADAPTERS, 0.1, seed) for seed in range(2)]
    batches = [astype(collate(packed_rows([[5], [4]], seed), 5), torch.float64) for seed in (7, 8)]
    stacked = tree_map(lambda *xs: torch.stack(xs), *many)
    (mapped,) = stack_batches([[batch] for batch in batches])
    got = vmap(lambda adapters, batch: sums(adapters, batch)[0])(stacked, mapped)
    close(got, torch.stack([sums(*pair)[0] for pair in zip(many, batches, strict=True)]), 1e-11)
    got = vmap(lambda adapters: grad(lambda a: sums(a, flat)[0].square().sum())(adapters))(stacked)
    expected = [grad(lambda a: sums(a, flat)[0].square().sum())(adapters) for adapters in many]
    close(got, tree_map(lambda *xs: torch.stack(xs), *expected), 1e-11)
