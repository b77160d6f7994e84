"""Which rows an update reads, in micro-batches of any size, from any update on, at any width."""

import itertools
from dataclasses import replace

import pytest
import torch
from builders import tiny
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.cli.training.build import batches
from fgpt.cli.training.row_order import RowOrder
from fgpt.data import packing
from fgpt.data.examples import Example
from fgpt.data.mixtures import Mixture
from fgpt.losses import nll
from fgpt.recipes import FineTuningRecipe, find

EXAMPLES = [
    Example.completion(tuple(1 + (7 * i + j) % 30 for j in range(3 + i % 6)), prompt_length=1) for i in range(37)
]
WIDTH = 12
RECORDED = [[[31, 17], [6, 3, 24], [2, 27], [23, 1]], [[5, 12], [29, 13], [33, 20], [26, 7, 36]]]


def recipe(micro_batch_size: int, grad_accumulation_steps: int, seed: int = 0) -> FineTuningRecipe:
    found = find("lora-nano")
    assert isinstance(found, FineTuningRecipe)
    sizes = {"micro_batch_size": micro_batch_size, "grad_accumulation_steps": grad_accumulation_steps}
    return replace(found, seed=seed, steps=None, epochs=1.0, **sizes)


@given(st.sampled_from([(1, 6), (2, 3), (3, 2), (6, 1)]), st.integers(0, 40), st.integers(0, 99))
def test_an_update_reads_the_same_rows_in_micro_batches_of_any_size(sizes: tuple[int, int], begin: int, seed: int):
    order, other = (RowOrder(EXAMPLES, recipe(*x, seed), WIDTH) for x in ((6, 1), sizes))
    expected = list(itertools.islice(order.updates(), begin, begin + 4))
    assert list(itertools.islice(other.updates(begin), 4)) == expected
    assert order.num_steps() == other.num_steps() == len(order.first_epoch)


def test_an_epoch_reads_each_example_once():
    order = RowOrder(EXAMPLES, recipe(2, 2), WIDTH)
    updates = [order.read(update) for update in order.first_epoch]
    read = [example for rows in updates for row in rows for example in row]
    assert sorted(example.tokens for example in read) == sorted(example.tokens for example in EXAMPLES)
    assert all(1 <= len(rows) <= 4 for rows in updates)
    assert sum(len(rows) < 4 for rows in updates) <= 1


MIXTURE = Mixture((30, 7), (20, 17))


@given(st.integers(0, 40), st.integers(0, 99))
def test_the_epochs_of_a_mixture_follow_from_the_seed_from_any_update_on(begin: int, seed: int):
    order, other = (RowOrder(EXAMPLES, recipe(2, 2, seed), WIDTH, MIXTURE) for _ in range(2))
    expected = list(itertools.islice(order.updates(), begin, begin + 4))
    assert list(itertools.islice(other.updates(begin), 4)) == expected


def test_an_epoch_reads_what_its_mixture_draws():
    order = RowOrder(EXAMPLES, recipe(2, 2), WIDTH, MIXTURE)
    read = [i for update in order.first_epoch for row in update for i in row]
    assert len(read) == 37
    assert sum(i < 30 for i in read) == 20
    assert len({i for i in read if i < 30}) == 20
    assert {i for i in read if i >= 30} == {*range(30, 37)}


def test_sources_without_weights_are_read_as_one():
    orders = [RowOrder(EXAMPLES, recipe(2, 2), WIDTH, mixture) for mixture in (None, Mixture((30, 7), (30, 7)))]
    first, second = (list(itertools.islice(order.updates(), 40)) for order in orders)
    assert first == second


def test_the_rows_of_an_update_are_those_that_were_recorded():
    """A run of an earlier version is resumed with the rows that it would have read."""
    order = RowOrder(EXAMPLES, recipe(2, 2, seed=5), WIDTH)
    assert order.first_epoch[:2] == RECORDED


def test_the_gradient_of_an_update_is_the_same_up_to_rounding():
    params, order = tiny(), RowOrder(EXAMPLES, recipe(6, 1), WIDTH)

    def total(micro_batch_size: int, pad_to: int | None) -> list[float]:
        micro_batches = next(batches(order, micro_batch_size, pad_to))
        assert pad_to is None or {batch.tokens.shape[1] for batch in micro_batches} == {pad_to}
        return torch.tensor([[float(x) for x in nll(params, batch)] for batch in micro_batches]).sum(0).tolist()

    expected = total(6, None)
    for micro_batch_size in (1, 4, 6):
        for pad_to in (None, WIDTH):
            assert total(micro_batch_size, pad_to) == pytest.approx(expected, rel=1e-5)


def test_the_first_epoch_is_laid_out_once(monkeypatch: pytest.MonkeyPatch):
    calls, lay_out = [], packing.lay_out_rows

    def count(*args: object, **options: object) -> object:
        calls.append(args)
        return lay_out(*args, **options)  # pyright: ignore

    monkeypatch.setattr(packing, "lay_out_rows", count)
    order = RowOrder(EXAMPLES, recipe(2, 2), WIDTH)
    steps = order.num_steps()
    assert len(list(itertools.islice(order.updates(), steps))) == steps
    assert len(calls) == 1


def test_examples_that_cannot_be_trained_on_are_errors():
    with pytest.raises(fgpt.InputError, match="row 37 has 8 tokens, the limit is 5"):
        RowOrder([Example.completion((1, 2, 3), 1)] * 36 + [Example.completion(tuple(range(8)), 1)], recipe(2, 2), 5)
