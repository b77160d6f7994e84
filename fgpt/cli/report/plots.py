"""Line plots as SVG for a page: drawn by matplotlib, in colors of the page's style, so that dark mode applies to them.

Source: https://matplotlib.org/stable/users/explain/customizing.html (svg.fonttype, path.simplify_threshold).
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fgpt.cli.report.formatting import number

Point = tuple[float, float]

COLORS = {
    "raw": "#a5c5e3",
    "smooth": "#1f6fb8",
    "heldout": "#b4611a",
    "eval1": "#2e8a57",
    "eval2": "#8a4fb0",
    "eval3": "#b03a56",
    "soft": "#5a6877",
    "line": "#dce2e9",
}
"""The page's color variables, each with the color that stands for it while matplotlib draws."""

EVAL_COLORS = ("heldout", "eval1", "eval2", "eval3")
"""Of the curves of evaluations, in turn; their points are marked."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "fgpt",  # the same data give the same file
    "path.simplify_threshold": 1.0,  # points: a long line keeps its peaks, and about one vertex for each point of width
    "font.size": 12,
}
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""matplotlib writes none of these."""


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    """(step, value), values finite."""
    color: str
    """A name in COLORS."""
    marked: bool | None = None
    """Whether its points are marked; None marks those of EVAL_COLORS."""


@dataclass(frozen=True)
class Plot:
    title: str
    series: Sequence[Series]
    unit: str = ""
    wide: bool = False
    from_zero: bool = False
    log: bool = False

    @property
    def svg(self) -> Markup:
        """An <svg> element without a size of its own; its title is what a screen reader says."""
        from matplotlib import rc_context  # here, because importing it takes a second

        svg = io.StringIO()
        with rc_context(STYLE):
            self._figure().savefig(svg, format="svg", transparent=True, metadata=METADATA)
        return Markup(_inline(svg.getvalue(), Markup.escape(self.title)))

    def _figure(self) -> Any:
        """As a matplotlib Figure."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        figure = Figure(figsize=(13.9 if self.wide else 7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for series in self.series:
            is_marked = series.color in EVAL_COLORS if series.marked is None else series.marked
            marker = "o" if is_marked or len(series.points) == 1 else ""
            width = 1.0 if series.color == "raw" else 2.0
            axes.plot(*zip(*series.points), color=COLORS[series.color], linewidth=width, marker=marker, clip_on=False)
        if self.log:
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))
        if self.from_zero:
            axes.set_ylim(bottom=0)
        axes.margins(x=0)
        axes.grid(axis="y", color=COLORS["line"])
        axes.set_axisbelow(True)
        axes.tick_params(which="both", left=False, bottom=False, labelcolor=COLORS["soft"])
        axes.set_xlabel("step", color=COLORS["soft"], loc="right")
        axes.spines[:].set_visible(False)
        return figure


def _inline(svg: str, label: str) -> str:
    """matplotlib's file as an element of a page: no header, size, ids or style of its own, and the page's colors."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<svg[^>]*?( viewBox=\"[^\"]*\")[^>]*>", rf'<svg\1 role="img" aria-label="{label}">', svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg
