"""Which scores of a comparison differ by more than chance: intervals of 95 % over the prompts.

A score is a ratio of sums over k prompts, s = Σ xᵢ / Σ wᵢ. To first order prompt i changes it by

    uᵢ = (xᵢ - s wᵢ) / Σ w,   and   Var s ≈ k / (k - 1) · Σ uᵢ²

Two sides answer the same prompts, and their difference has uᵢ - vᵢ in place of uᵢ. Half an interval is t √Var, with
Student's t of k - 1 degrees of freedom.

Source: Cochran 1977, Sampling Techniques, section 2.11 (ratios).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEVEL = 0.95
FEWEST = 6
"""Prompts: of fewer no difference has p < 0.05 even if all have the same sign, 2 / 2⁵ = 0.06."""

HIGHER_IS_BETTER = ("points", "stories with", "ROUGE-L", "FinQA exact", "constraints met")
LOWER_IS_BETTER = ("held-out response loss", "response loss")
"""How the names of such scores begin. The others are neither: an empty answer repeats nothing."""


class Part(NamedTuple):
    """What a prompt contributes to a score."""

    x: float
    w: float
    """0 if the score is not of this prompt."""


Parts = Mapping[str, Sequence[Part]]
"""The parts of each score of a side, one for each prompt."""


def half_widths(parts: Parts) -> dict[str, float]:
    """Half the interval of each score that has enough prompts, which are not all alike.

    >>> widths = half_widths({"points": [Part(x, 1) for x in (0, 0, 0, 100, 100, 100)]})
    >>> round(widths["points"], 2)  # 2.5706 · 100 / (2 √5)
    57.48
    >>> half_widths({"points": [Part(100, 1)] * 5})
    {}
    """
    widths = {}
    for name, of_prompts in parts.items():
        k, values = _num_prompts(of_prompts), {part.x / part.w for part in of_prompts if part.w}
        if k >= FEWEST and len(values) > 1:
            widths[name] = _half_width(_influences(of_prompts), k)
    return widths


def best_sides(by_side: Mapping[str, Parts]) -> dict[str, list[str]]:
    """Of each score the best side, and those that cannot be told from it; none if that is all of them.

    >>> zeros, ones = [Part(0, 1)] * 6, [Part(1, 1)] * 6
    >>> best_sides({"base": {"points": zeros}, "tuned": {"points": ones}})
    {'points': ['tuned']}
    """
    first, *_ = by_side.values()
    best: dict[str, list[str]] = {}
    for name in first:
        if not name.startswith(HIGHER_IS_BETTER + LOWER_IS_BETTER) or _num_prompts(first[name]) < FEWEST:
            continue
        sign = 1 if name.startswith(HIGHER_IS_BETTER) else -1
        leader = max(by_side, key=lambda side: sign * _ratio(by_side[side][name]))
        equal = [side for side in by_side if not _differ(by_side[leader][name], by_side[side][name])]
        if len(equal) < len(by_side):
            best[name] = equal
    return best


def _differ(one: Sequence[Part], other: Sequence[Part]) -> bool:
    """Whether two sides' scores differ by more than half the interval of their difference."""
    influences = [u - v for u, v in zip(_influences(one), _influences(other), strict=True)]
    return abs(_ratio(one) - _ratio(other)) > _half_width(influences, _num_prompts(one))


def _ratio(parts: Sequence[Part]) -> float:
    return math.fsum(part.x for part in parts) / math.fsum(part.w for part in parts)


def _influences(parts: Sequence[Part]) -> list[float]:
    """How much each prompt changes the ratio, to first order."""
    ratio, total = _ratio(parts), math.fsum(part.w for part in parts)
    return [(part.x - ratio * part.w) / total for part in parts]


def _half_width(influences: Sequence[float], k: int) -> float:
    from scipy.special import stdtrit  # here, because importing it takes a while

    variance = k / (k - 1) * math.fsum(u * u for u in influences)
    return float(stdtrit(k - 1, (1 + LEVEL) / 2)) * math.sqrt(variance)


def _num_prompts(parts: Sequence[Part]) -> int:
    """The prompts that a score is of."""
    return sum(part.w > 0 for part in parts)
