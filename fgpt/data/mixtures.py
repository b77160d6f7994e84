"""Mixtures of sources: how many examples of each an epoch draws, and which.

The examples of a source are drawn from one permutation of them after the other, without replacement: an epoch takes the
next ones. So every example of a source is used equally often, a source smaller than its part of an epoch is repeated,
and what an epoch draws is a function of the key and the epoch's number alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
import torch

from fgpt.errors import InputError, check_choice
from fgpt.ranges import Range
from fgpt.rng import fold_in

MixtureUnit = Literal["examples", "tokens"]
"""What the weights of a mixture count."""


class MixtureSource(NamedTuple):
    """A source of a mixture."""

    name: str
    weight: float | None
    """Its share, relative to those of the other sources; None if no source has one."""
    size: int
    """Number of its examples."""
    tokens: int
    """Tokens of all its examples."""


@dataclass(frozen=True)
class Mixture:
    """How many examples of each source an epoch draws. The examples of the sources follow one another in one sequence.

    >>> Mixture(sizes=(3, 2), counts=(3, 2)).draw(torch.Generator().manual_seed(0), epoch=0)
    array([0, 1, 2, 3, 4])
    """

    sizes: tuple[int, ...]
    """Number of examples of each source."""
    counts: tuple[int, ...]
    """Number of examples of each source in an epoch."""

    def draw(self, rng: torch.Generator, epoch: int) -> np.ndarray:
        """The examples of an epoch, as indices in ascending order, source by source. An example that an epoch repeats
        occurs several times. The same for `counts` equal to `sizes` in each epoch: all of them.

        Args:
            rng: The key of the mixture.
            epoch: The number of the epoch, from 0 on.
        """
        starts = accumulate(self.sizes, initial=0)
        parts = []
        for number, (start, size, count) in enumerate(zip(starts, self.sizes, self.counts)):
            drawn = _draw(size, range(epoch * count, (epoch + 1) * count), fold_in(rng, f"source {number}"))
            parts.append(start + np.sort(drawn))
        return np.concatenate(parts)


def mix(sources: Sequence[MixtureSource], unit: MixtureUnit = "examples") -> Mixture:
    """The mixture of sources by their weights: an epoch has as many examples as all sources together, and each source
    gives its share of them, rounded by the method of the largest remainder. Without weights each is taken whole.

    Args:
        sources: The sources, in the order of their examples.
        unit: Whether the weights are shares of the examples or of the tokens of an epoch; a source has tokens in
            proportion to the mean length of its examples.

    Raises:
        InputError: as `check_weights` does, for a unit that is neither, and for a source with a weight and no examples.

    >>> sources = [MixtureSource("a", 0.75, 50, 1000), MixtureSource("b", 0.25, 50, 3000)]
    >>> mix(sources).counts, mix(sources, "tokens").counts
    ((75, 25), (90, 10))
    """
    check_choice("unit", unit, MixtureUnit)
    check_weights([(source.name, source.weight) for source in sources])
    sizes = tuple(source.size for source in sources)
    shares = []
    for source in sources:
        if source.weight is None:
            return Mixture(sizes, sizes)
        if not source.tokens:
            raise InputError(f"{source.name} has no examples to draw from: leave it out of the mixture, or add some")
        per_example = Fraction(source.tokens, source.size) if unit == "tokens" else 1
        shares.append(Fraction(source.weight) / per_example)
    return Mixture(sizes, apportion(sum(sizes), shares))


def check_weights(weights: Sequence[tuple[str, float | None]]) -> None:
    """Raises InputError for a weight that is not a positive number, and for a source without one beside others that
    have one.

    Args:
        weights: The name of each source and its weight, None for none.
    """
    if all(weight is None for _, weight in weights):
        return
    for name, weight in weights:
        if weight is None:
            raise InputError(f"{name} has no weight, and other sources have one: give one to each source, or to none")
        if not Range(above=0).holds(weight):
            raise InputError(f"the weight of {name} is {weight}: expected a positive number")


def apportion(total: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Integers of sum `total` in proportion to the shares, each less than 1 from its exact part.

    Source: the method of the largest remainder (Hamilton); of equal remainders the first is rounded up.

    >>> apportion(10, [Fraction(1), Fraction(1), Fraction(1)])
    (4, 3, 3)
    """
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def _draw(size: int, positions: range, rng: torch.Generator) -> np.ndarray:
    """Elements `positions` of a sequence that consists of permutations of 0, 1, .., size - 1; a permutation that is
    drawn whole in ascending order.
    """
    drawn = [np.arange(0)]
    begin = positions.start
    while begin < positions.stop:
        number, offset = divmod(begin, size)
        end = min(positions.stop, (number + 1) * size)
        if end - begin == size:
            drawn.append(np.arange(size))
        else:
            permutation = torch.randperm(size, generator=fold_in(rng, f"pass {number}"))
            drawn.append(permutation[offset : offset + end - begin].numpy())
        begin = end
    return np.concatenate(drawn)
