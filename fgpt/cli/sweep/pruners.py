"""Which members of a sweep are stopped early: after a few steps a training that will not win mostly shows it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

PrunerName: TypeAlias = Literal["none", "halving", "median"]


def halving_rungs(members: int, steps: int, reduction_factor: int, min_steps: int | None = None) -> list[int]:
    """The steps after which successive halving keeps one member in `reduction_factor`, in rising order: each rung has
    `reduction_factor` times the steps of the one before it, until one member is left.

    Args:
        members: How many begin.
        steps: Of the whole training.
        reduction_factor: 2 or more.
        min_steps: The first rung. None places the last rung at a quarter of the training.

    Source: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification", section 3.

    >>> halving_rungs(8, 320, 2)
    [20, 40, 80]
    """
    count = 0
    while members > 1:
        members, count = math.ceil(members / reduction_factor), count + 1
    if min_steps is None:
        min_steps = max(1, math.ceil(steps / (4 * reduction_factor ** max(0, count - 1))))
    rungs = [min_steps * reduction_factor**i for i in range(count)]
    return [rung for rung in rungs if rung < steps]


def median_rungs(steps: int, min_steps: int | None = None) -> list[int]:
    """The steps after which the median rule decides: each tenth of the training from `min_steps` (None: a fifth) on.

    >>> median_rungs(100)
    [20, 30, 40, 50, 60, 70, 80, 90]
    """
    every = max(1, steps // 10)
    begin = max(1, steps // 5) if min_steps is None else min_steps
    return list(range(begin, steps, every))


def halving_losers(losses: Mapping[str, float], reduction_factor: int) -> list[str]:
    """The members that are stopped at a rung: all but the best of one in `reduction_factor`, rounded up. Of equal ones
    the earlier stays.

    >>> halving_losers({"a": 2.0, "b": 1.0, "c": 3.0}, 2)
    ['c']
    """
    ranked = sorted(losses, key=lambda name: (_rank(losses[name]), list(losses).index(name)))
    return ranked[math.ceil(len(ranked) / reduction_factor) :]


def below_median(losses: Mapping[str, float], earlier: Mapping[str, Sequence[float]]) -> list[str]:
    """The members whose best loss so far is worse than the median of what all members had at this rung.

    Args:
        losses: Of the members that are still trained, at this rung.
        earlier: Of all members, the stopped ones too, at the rungs up to this one.

    Source: Golovin et al. 2017, "Google Vizier", section 3.2.2.

    >>> below_median({"a": 2.0, "b": 1.0, "c": 3.0}, {"a": [2.0], "b": [1.0], "c": [3.0]})
    ['c']
    """
    median = statistics.median(_rank(x) for x in losses.values())
    return [name for name in losses if min(map(_rank, earlier[name])) > median]


def _rank(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
