"""A chart as SVG that takes its colors from the page, so that it is light or dark as the page is."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

HIGH = 300
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 34
"""The margins around the plot."""
MOST = 400
"""Stretches that a line is drawn in: of a longer one each stretch shows its least and its greatest value."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    look: str
    """A class of the page's style: raw, smooth, or dots, which marks each point."""


def chart(label: str, series: Sequence[Series], wide: int, zero: bool = False, logarithmic: bool = False) -> str:
    """Lines over steps. Infinite values, and on a logarithmic axis those below zero, are left out; `zero` begins the
    axis there. `wide` is to `HIGH` as the drawing is; `label` is what a screen reader says.
    """
    kept = [_finite(s, logarithmic) for s in series]
    points = [p for s in kept for p in s.points]
    if not points:
        return '<p class="none">no value to draw</p>'
    low, high = min(y for _, y in points), max(y for _, y in points)
    across = ticks(min(x for x, _ in points), max(x for x, _ in points), whole=True)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    up = powers(low, high) if logarithmic else ticks(0.0 if zero else low, high)
    scale = math.log10 if logarithmic else float
    bottom, top = scale(min(low, up[0])) if not zero else 0.0, scale(max(high, up[-1]))

    def at(x: float, y: float) -> Point:
        right = (x - first) / (last - first) if last > first else 0.5
        above = (scale(y) - bottom) / (top - bottom) if top > bottom else 0.5
        return LEFT + right * (wide - LEFT - RIGHT), HIGH - BOTTOM - above * (HIGH - TOP - BOTTOM)

    grid = ""
    for y in up:
        _, down = at(first, y)
        grid += f'<line x1="{LEFT}" x2="{wide - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>'
        grid += f'<text x="{LEFT - 8}" y="{down + 4:.1f}" text-anchor="end">{number(y)}</text>'
    for x in across:
        along, _ = at(x, low)
        grid += f'<text x="{along:.1f}" y="{HIGH - BOTTOM + 17}" text-anchor="middle">{number(x)}</text>'
    axis = f'<text x="{wide - RIGHT}" y="{HIGH - 3}" text-anchor="end">step</text>'
    drawn = "".join(_drawn(s, [at(*p) for p in thinned(s.points)]) for s in kept if s.points)
    return (
        f'<svg viewBox="0 0 {wide} {HIGH}" role="img" aria-label="{html.escape(label)}">'
        f'<g class="grid">{grid}{axis}</g>{drawn}</svg>'
    )


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Round values from `low` to `high`, `most` of them or fewer: 1, 2 or 5 times a power of ten apart."""
    span = (high - low) or abs(high) or 1.0
    apart = 10.0 ** math.floor(math.log10(span / most))
    apart = next(apart * times for times in (1, 2, 5, 10, 20) if span / (apart * times) <= most - 1)
    apart = max(apart, 1.0) if whole else apart
    found = [apart * i for i in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]
    return found or [low]


def powers(low: float, high: float) -> list[float]:
    """Round values for a logarithmic axis: powers of ten, and where these are few their twice and five times too."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for times in ((1,), (1, 2, 5)):
        found = [m * 10.0**n for n in tens for m in times if low <= m * 10.0**n <= high]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / 8) or 1] or [low]


def number(x: float) -> str:
    """In few characters: 12,000 or 0.0025 or 2.5e-6."""
    if x == 0:
        return "0"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.4g}" if abs(x) >= 1e-3 else f"{x:.2g}".replace("e-0", "e-")


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """All points, or of many the least and the greatest of each stretch, in their order."""
    if len(points) <= 2 * MOST:
        return points
    found: list[Point] = []
    for i in range(MOST):
        some = points[i * len(points) // MOST : (i + 1) * len(points) // MOST]
        found += sorted({min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])})
    return found


def _finite(s: Series, logarithmic: bool) -> Series:
    return Series(s.name, [p for p in s.points if math.isfinite(p[1]) and (p[1] > 0 or not logarithmic)], s.look)


def _drawn(s: Series, at: Sequence[Point]) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    marked = at if s.look == "dots" or len(at) == 1 else []
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in marked)
    return f'<g class="{s.look}"><title>{html.escape(s.name)}</title><polyline points="{line}"/>{dots}</g>'
