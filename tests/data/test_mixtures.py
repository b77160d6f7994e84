"""An epoch of a mixture: its ratios, which examples it draws, and what that depends on."""

from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.data.mixtures import Mixture, MixtureSource, mix
from fgpt.errors import InputError

WEIGHTS = st.floats(1e-3, 1e3)
SIZES = st.integers(1, 40)
SOURCES = st.lists(
    st.builds(
        lambda weight, size, length: MixtureSource("a.json", weight, size, size * length),
        WEIGHTS,
        SIZES,
        st.integers(2, 9),
    ),
    min_size=1,
    max_size=5,
)
MIXTURES = st.lists(st.tuples(SIZES, st.integers(0, 90)), min_size=1, max_size=4).map(
    lambda pairs: Mixture(*map(tuple, zip(*pairs)))
)


@given(SOURCES)
def test_the_ratios_are_hit_within_one_example(sources: list[MixtureSource]):
    mixture, total = mix(sources), sum(source.size for source in sources)
    assert sum(mixture.counts) == total
    weights = [source.weight or 0 for source in sources]
    for count, weight in zip(mixture.counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1 + 1e-9


@given(SOURCES)
def test_the_ratios_of_tokens_are_hit_within_one_example_of_each_source(sources: list[MixtureSource]):
    mixture = mix(sources, "tokens")
    assert sum(mixture.counts) == sum(source.size for source in sources)
    lengths = [source.tokens / source.size for source in sources]
    weights = [source.weight or 0 for source in sources]
    exact = [weight / length for weight, length in zip(weights, lengths, strict=True)]
    for count, part in zip(mixture.counts, exact, strict=True):
        assert abs(count - sum(mixture.counts) * part / sum(exact)) < 1 + 1e-9


@given(MIXTURES, st.integers(0, 99), st.integers(1, 5))
def test_every_example_of_a_source_is_used_equally_often(mixture: Mixture, seed: int, epochs: int):
    uses = Counter[int]()
    for epoch in range(epochs):
        drawn = mixture.draw(fgpt.key(seed), epoch)
        assert len(drawn) == sum(mixture.counts)
        uses.update(drawn.tolist())
    for start, size, count in zip(accumulate(mixture.sizes, initial=0), mixture.sizes, mixture.counts):
        of_source = [uses[i] for i in range(start, start + size)]
        assert sum(of_source) == epochs * count
        assert max(of_source) - min(of_source) <= 1


@given(MIXTURES, st.integers(0, 99), st.integers(0, 200))
def test_an_epoch_is_a_function_of_the_key_and_its_number(mixture: Mixture, seed: int, epoch: int):
    """From whichever epoch a training is resumed."""
    rng = fgpt.key(seed)
    expected = mixture.draw(rng, epoch)
    mixture.draw(rng, epoch + 1)
    assert np.array_equal(mixture.draw(fgpt.key(seed), epoch), expected)


def test_other_keys_sources_and_epochs_draw_other_examples():
    mixture = Mixture((1000, 1000), (200, 200))
    first, second = mixture.draw(fgpt.key(0), 0)[:200], mixture.draw(fgpt.key(0), 0)[200:] - 1000
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, mixture.draw(fgpt.key(1), 0)[:200])
    assert not np.intersect1d(first, mixture.draw(fgpt.key(0), 1)[:200]).size


@given(st.lists(SIZES, min_size=1, max_size=5), st.integers(0, 9))
def test_without_weights_each_epoch_has_every_example_once(sizes: list[int], epoch: int):
    mixture = mix([MixtureSource("a.json", None, size, 3 * size) for size in sizes])
    assert mixture.draw(fgpt.key(0), epoch).tolist() == list(range(sum(sizes)))


@given(st.lists(SIZES, min_size=1, max_size=5), st.integers(0, 9))
def test_weights_that_are_the_sizes_change_nothing(sizes: list[int], epoch: int):
    mixture = mix([MixtureSource("a.json", float(size), size, 3 * size) for size in sizes])
    assert mixture.draw(fgpt.key(0), epoch).tolist() == list(range(sum(sizes)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5, None), "b.json has no weight, and other sources have one: give one to each source, or to none"),
        ((0.5, -1.0), "the weight of b.json is -1.0: expected a positive number"),
        ((0.5, float("nan")), "the weight of b.json is nan: expected a positive number"),
        ((0.5, float("inf")), "the weight of b.json is inf: expected a positive number"),
        ((0.0, 1.0), "the weight of a.json is 0.0: expected a positive number"),
    ],
)
def test_unusable_weights_are_errors(weights: tuple[float | None, ...], message: str):
    with pytest.raises(InputError, match=message):
        mix([MixtureSource(name, weight, 3, 9) for name, weight in zip(("a.json", "b.json"), weights)])


def test_a_source_without_examples_cannot_be_drawn_from():
    with pytest.raises(InputError, match=r"b\.json has no examples to draw from"):
        mix([MixtureSource("a.json", 0.5, 3, 9), MixtureSource("b.json", 0.5, 0, 0)])
