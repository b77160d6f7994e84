"""Curves: peaks stay, colors are the page's, smoothing owes nothing to its beginning."""

import re

import pytest

from fgpt.cli.report import curves
from fgpt.cli.report.plots import Plot, Series


def vertices(svg: str) -> list[tuple[float, float]]:
    """The points of the drawn line, in the order of the file."""
    line = next(path for path in re.findall(r'<path d="([^"]*)"[^>]*var\(--smooth\)', svg))
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", line)]


def test_a_long_line_keeps_its_peaks():
    values = [float(i % 7) for i in range(50_000)]
    values[12_345], values[40_000] = 90.0, -90.0
    svg = Plot("loss", [Series("loss", [*enumerate(values)], "smooth")]).svg
    points = vertices(svg)
    assert len(points) < 10_000
    heights = sorted(y for _, y in points)
    assert heights[0] < heights[5] - 50  # y grows downwards: one vertex is high above all others
    assert heights[-1] > heights[-6] + 50


def test_a_plot_takes_the_page_s_colors_and_is_reproducible():
    plot = Plot("a <b>", [Series("x", [(1, 2.0), (2, 3.0)], "raw"), Series("y", [(1, 2.5)], "heldout")], log=True)
    assert plot.svg == plot.svg
    assert set(re.findall(r"#[0-9a-f]{6}", plot.svg)) <= {"#000000"}
    assert plot.svg.startswith("<svg viewBox=")
    assert 'aria-label="a &lt;b&gt;"' in plot.svg
    assert not re.search(r"<(style|metadata|image|script)|http|<!", plot.svg)


def test_tokens_per_second_are_each_step_s_own():
    lines = [{"step": i, "tokens": t, "seconds": s} for i, (t, s) in enumerate([(10, 1.0), (30, 2.0), (8, 2.0)], 1)]
    assert curves.tokens_per_second(lines) == [
        (1, 10.0),
        (2, 20.0),
        (3, 4.0),
    ]  # the counters began anew before the last
    assert curves.tokens_per_second([{"step": 1, "loss": 2.0}]) == []


def test_smoothing_owes_nothing_to_its_beginning():
    assert [y for _, y in curves.smooth([(1, 3.0), (2, 3.0), (3, 3.0)])] == pytest.approx([3.0, 3.0, 3.0])


def test_values_that_are_no_numbers_are_left_out():
    lines = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None}]
    assert curves.values(lines, "loss") == [(2, 2.0)]
    (plot,) = curves.curves(lines, "token")
    assert "nan" not in plot.svg
