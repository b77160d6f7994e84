"""Charts: peaks stay, colors are the page's, values are there for who points and who listens."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpt.cli.pages.charts import NUM_TICKS, PALE, STRIPS, Chart, Series

FLOATS = st.floats(-1e9, 1e9, allow_subnormal=False)


def path_points(svg: str) -> list[tuple[float, float]]:
    """The points of the first curve, in its own units of 0 to 1000."""
    (path, *_) = re.findall(r'<path [^>]*d="M([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in (point.split() for point in path.split("L"))]


def test_a_curve_is_where_its_values_are():
    svg = Chart("loss", [Series("loss", [(1, 0.0), (3, 10.0), (5, 5.0)], "c1")], from_zero=True).svg
    assert path_points(svg) == [(0.0, 1000.0), (500.0, pytest.approx(47.6)), (1000.0, pytest.approx(523.8))]


def test_a_logarithm_has_equal_ratios_at_equal_distances():
    svg = Chart("norm", [Series("norm", [(1, 1.0), (2, 10.0), (3, 100.0)], "c1")], log=True).svg
    (_, a), (_, b), (_, c) = path_points(svg)
    assert a - b == pytest.approx(b - c, abs=0.2)
    assert {"1", "10", "100"} <= set(re.findall(r'text-anchor="end">([\d.,]+)</text>', svg))


def test_a_long_curve_keeps_its_peaks():
    values = [float(i % 7) for i in range(50_000)]
    values[12_345], values[40_000] = 90.0, -90.0
    points = path_points(Chart("loss", [Series("loss", [*enumerate(values)], "c1")]).svg)
    assert len(points) < 5_000
    heights = sorted(y for _, y in points)
    assert heights[0] < heights[1] - 300  # y grows downwards: one vertex is high above all others
    assert heights[-1] > heights[-2] + 300


def test_a_chart_takes_the_page_s_colors_and_is_reproducible():
    chart = Chart("a <b>", [Series("x", [(1, 2.0), (2, 3.0)], PALE), Series("y & z", [(1, 2.5)], "c2")], log=True)
    assert chart.svg == chart.svg
    assert not re.search(r"#[0-9a-f]{3}|rgb\(", chart.svg)
    assert 'aria-label="a &lt;b&gt; by step. x: from 2 at step 1 to 3 at step 2' in chart.svg
    assert not re.search(r"<(style|metadata|image|script)|http|<!", chart.svg)


def test_the_values_of_a_step_are_the_title_of_its_strip():
    chart = Chart("loss", [Series("train", [(1, 2.0), (2, 1.5)], "c1"), Series("news", [(2, 1.75)], "c2", marked=True)])
    svg = ElementTree.fromstring(chart.svg)
    titles = [group.findtext("title") for group in svg.findall("g")]
    assert titles == ["step 1\ntrain: 2", "step 2\ntrain: 1.5\nnews: 1.75"]
    assert svg.findall("g/rect")[1].get("x") == "50.00%"
    assert [circle.get("class") for circle in svg.findall("circle")] == ["point"]


def test_the_lowest_value_is_marked():
    points = [(4, 2.0), (8, 1.25), (12, 1.5)]
    chart = Chart("loss", [Series("held-out", points, "c2", marked=True, lowest=True)])
    assert [name for name, _ in chart.legend] == ["held-out, best 1.25 at step 8"]
    (mark,) = [x for x in ElementTree.fromstring(chart.svg).findall("circle") if x.get("class") == "lowest"]
    assert mark.get("cx") == "50.0%"
    assert "lowest 1.25 at step 8" in chart.description


def test_pale_curves_share_one_name():
    pale = [Series(f"run {i}", [(1, float(i)), (2, 1.0)], PALE) for i in range(3)]
    chart = Chart("loss", [Series("best", [(1, 1.0), (2, 0.5)], "c1"), *pale])
    assert [name for name, _ in chart.legend] == ["best", "others"]
    assert chart.svg.index("--c: var(--raw)") < chart.svg.index("--c: var(--c1)")  # behind it


@given(
    points=st.lists(st.tuples(st.integers(1, 10**7), FLOATS), min_size=1, max_size=400, unique_by=lambda p: p[0]),
    log=st.booleans(),
    from_zero=st.booleans(),
)
def test_any_values_can_be_drawn(points: list[tuple[int, float]], log: bool, from_zero: bool):
    points = [(step, abs(value) + 1e-9 if log else value) for step, value in sorted(points)]
    svg = Chart("x", [Series("x", points, "c1")], log=log, from_zero=from_zero and not log).svg
    ElementTree.fromstring(svg)
    assert not re.search(r"\b(nan|inf)\b", svg)
    shares = [float(x) for x in re.findall(r'"(-?[\d.]+)%"', svg)]
    assert all(0 <= share <= 100 for share in shares)
    assert svg.count('class="grid"') <= NUM_TICKS + 1
    assert svg.count('class="step"') <= STRIPS + 1
