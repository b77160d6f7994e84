"""Line charts as SVG, in colors of the page's style, so that dark mode applies to them.

Positions are shares of the chart in percent, and sizes of texts are pixels: a chart is as wide as its place, and its
texts stay as large. Curves stand in an <svg> of their own that is stretched. The values of a step are the <title> of
the strip around it, which a browser shows under the pointer: no script is needed.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from fgpt.cli.pages.formatting import number

Point = tuple[float, float]
"""(step, value), both finite."""

SIZE = 1000
"""Units of a curve's own coordinates, in both directions."""
COLUMNS = 500
"""Of a curve: of the points in one of these the first, least, largest and last are drawn."""
STRIPS = 150
"""Most steps whose values are shown under the pointer."""
NUM_TICKS = 6
"""Most ticks of an axis."""
PALE = "raw"
"""The color of thin curves behind the others."""


@dataclass(frozen=True)
class Series:
    """A curve of a chart."""

    name: str
    points: Sequence[Point]
    color: str
    """The name of a color variable of the style."""
    marked: bool = False
    """Whether each of its points has a dot."""
    dashed: bool = False
    lowest: bool = False
    """Whether its least value is marked."""


@dataclass(frozen=True)
class Chart:
    """Curves over steps."""

    title: str
    series: Sequence[Series]
    unit: str = ""
    wide: bool = False
    from_zero: bool = False
    log: bool = False

    @property
    def legend(self) -> list[tuple[str, Series]]:
        """The names of the series, with the best values of those that are marked; "others" of several pale ones."""
        pale = [series for series in self.series if series.color == PALE]
        names = []
        for series in self.series:
            if series.lowest:
                step, value = lowest(series.points)
                names.append((f"{series.name}, best {number(value)} at step {step:g}", series))
            elif series.color != PALE or len(pale) == 1:
                names.append((series.name, series))
        return names + [("others", series) for series in pale[:1] if len(pale) > 1]

    @property
    def description(self) -> str:
        """What the curves show, for who does not see them."""
        sentences = []
        for series in self.series:
            (first, start), (last, end) = series.points[0], series.points[-1]
            step, value = lowest(series.points)
            sentences.append(
                f"{series.name}: from {number(start)} at step {first:g} to {number(end)} at step {last:g}, "
                f"lowest {number(value)} at step {step:g}"
            )
        return f"{self.title}{f' ({self.unit})' if self.unit else ''} by step. {'; '.join(sentences)}."

    @property
    def svg(self) -> Markup:
        """An <svg> element as wide as its place; its label is what a screen reader says."""
        scale = _Scale.of(self)
        y_ticks = [(scale.y(tick), number(tick)) for tick in scale.y_ticks]
        margin = 12 + 7 * max((len(text) for _, text in y_ticks), default=0)
        parts = [*_grid(y_ticks), *_steps(scale)]
        in_front_last = sorted(self.series, key=lambda series: series.color != PALE)
        curves = "".join(_curve(series, scale) for series in in_front_last if len(series.points) > 1)
        parts.append(
            Markup('<svg viewBox="0 0 {0} {0}" preserveAspectRatio="none" width="100%" height="100%">{1}</svg>').format(
                SIZE, Markup(curves)
            )
        )
        parts += [mark for series in self.series for mark in _marks(series, scale)]
        parts += _strips(self.series, scale)
        return Markup(
            '<svg role="img" aria-label="{}" style="margin-left: {}px; width: calc(100% - {}px)">\n{}\n</svg>'
        ).format(self.description, margin, margin + 6, Markup("\n").join(parts))


def lowest(points: Sequence[Point]) -> Point:
    """The point of the least value, the first of several.

    >>> lowest([(1, 3.0), (2, 2.0), (3, 2.0)])
    (2, 2.0)
    """
    return min(points, key=lambda point: point[1])


class _Scale(NamedTuple):
    """The ranges of both axes, and the ticks in them; y is a logarithm if `log`."""

    first: float
    last: float
    bottom: float
    top: float
    log: bool
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    @classmethod
    def of(cls, chart: Chart) -> "_Scale":
        steps = [step for series in chart.series for step, _ in series.points]
        values = [value for series in chart.series for _, value in series.points if value > 0 or not chart.log]
        low, high = (math.log10(x) if chart.log else x for x in (min(values), max(values)))
        low = min(low, 0) if chart.from_zero else low
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        bottom, top = (low if chart.from_zero and low == 0 else low - margin), high + margin
        y_ticks = _log_ticks(bottom, top) if chart.log else _ticks(bottom, top, 0.0)
        first, last = min(steps), max(steps)
        return cls(first, last, bottom, top, chart.log, _ticks(first, last, 1.0), y_ticks)

    def x(self, step: float) -> float:
        """From 0 to 100, rounded to what a screen can show."""
        return round(100 * (step - self.first) / (self.last - self.first), 2) if self.last > self.first else 50.0

    def y(self, value: float) -> float:
        """From 0 at the top to 100."""
        height = self.bottom if value <= 0 and self.log else math.log10(value) if self.log else value
        return round(100 * (self.top - height) / (self.top - self.bottom), 2)


def _ticks(low: float, high: float, least: float) -> list[float]:
    """The multiples of 1, 2 or 5 · 10^k in a range, at most NUM_TICKS of them; the interval is `least` or more.

    >>> _ticks(0.93, 2.2, 0.0)
    [1.0, 1.5, 2.0]
    >>> _ticks(1, 40, 1.0)
    [10.0, 20.0, 30.0, 40.0]
    """
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / NUM_TICKS))
    intervals = (factor * power for factor in (1, 2, 5, 10))
    interval = max(least, next(x for x in intervals if (high - low) / x <= NUM_TICKS))
    indices = range(math.ceil(low / interval), math.floor(high / interval) + 1)
    return [float(f"{i * interval:.12g}") for i in indices]


def _log_ticks(bottom: float, top: float) -> list[float]:
    """The powers of 10 between two of their logarithms, and 2 and 5 times them if there is space."""
    exponents = range(math.floor(bottom), math.ceil(top) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        ticks = [tick for tick in ticks if bottom <= math.log10(tick) <= top]
        if len(ticks) <= NUM_TICKS:
            break
    return ticks[:: max(1, math.ceil(len(ticks) / NUM_TICKS))]


def _grid(y_ticks: Sequence[tuple[float, str]]) -> Iterator[Markup]:
    line = Markup(
        '<line class="grid" x1="0" x2="100%" y1="{0}%" y2="{0}%"/>'
        '<text x="-8" y="{0}%" dy="4" text-anchor="end">{1}</text>'
    )
    for y, text in y_ticks:
        yield line.format(y, text)


def _steps(scale: _Scale) -> Iterator[Markup]:
    """The ticks of the steps below the chart, and what they are."""
    for tick in scale.x_ticks:
        x = scale.x(tick)
        anchor = "start" if x < 3 else "end" if x > 97 else "middle"
        yield Markup('<text x="{}%" y="100%" dy="18" text-anchor="{}">{}</text>').format(x, anchor, number(tick))
    yield Markup('<text x="100%" y="100%" dy="34" text-anchor="end">step</text>')


def _curve(series: Series, scale: _Scale) -> Markup:
    unit = SIZE / 100
    points = [(unit * scale.x(step), unit * scale.y(value)) for step, value in _thin(series.points, scale)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    classes = "curve" + " thin" * (series.color == PALE) + " dashed" * series.dashed
    return Markup('<path class="{}" style="--c: var(--{})" d="M{}"/>').format(classes, series.color, path)


def _thin(points: Sequence[Point], scale: _Scale) -> Iterator[Point]:
    """The points that a curve needs: those of a column are its first, least, largest and last, so that peaks stay."""
    for _, column in itertools.groupby(points, key=lambda point: int(COLUMNS * scale.x(point[0]) / 100)):
        same = list(column)
        least, largest = (choose(range(len(same)), key=lambda i: same[i][1]) for choose in (min, max))
        for i in sorted({0, least, largest, len(same) - 1}):
            yield same[i]


def _marks(series: Series, scale: _Scale) -> Iterator[Markup]:
    """The dots of a series, and the mark of its least value."""
    style = Markup('style="--c: var(--{})"').format(series.color)
    if series.marked or len(series.points) == 1:
        for step, value in _thin(series.points, scale):
            yield Markup('<circle class="point" {} cx="{}%" cy="{}%" r="3"/>').format(
                style, scale.x(step), scale.y(value)
            )
    if series.lowest:
        step, value = lowest(series.points)
        yield Markup(
            '<line class="lowest-step" {0} x1="{1}%" x2="{1}%" y1="{2}%" y2="100%"/>'
            '<circle class="lowest" {0} cx="{1}%" cy="{2}%" r="5"/>'
        ).format(style, scale.x(step), scale.y(value))


def _strips(all_series: Sequence[Series], scale: _Scale) -> Iterator[Markup]:
    """A strip around each step, with the values of that step; of many steps those that most series have."""
    values: dict[float, list[str]] = {}
    for series in all_series:
        for step, value in series.points:
            values.setdefault(step, []).append(f"{series.name}: {number(value)}")
    steps: list[float] = []
    for _, column in itertools.groupby(sorted(values), key=lambda step: int(STRIPS * scale.x(step) / 100)):
        steps.append(max(column, key=lambda step: len(values[step])))
    centers = [scale.x(step) for step in steps]
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(centers)), 100.0]
    strip = Markup(
        '<g class="step"><title>{}</title><rect x="{:.2f}%" width="{:.2f}%" height="100%"/>'
        '<line x1="{x}%" x2="{x}%" y1="0" y2="100%"/></g>'
    )
    for step, x, (left, right) in zip(steps, centers, itertools.pairwise(edges), strict=True):
        yield strip.format("\n".join([f"step {step:g}", *values[step]]), left, right - left, x=x)
