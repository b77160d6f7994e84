"""The course of a training, from its metrics: charts, the numbers that sum it up, and a table of evaluations."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fgpt.cli.metrics_log import HELDOUT_LOSS, Line, ema, eval_losses
from fgpt.cli.pages.charts import PALE, Chart, Point, Series, lowest
from fgpt.cli.pages.formatting import duration, number, percent
from fgpt.cli.pages.tables import Cell, Column, Table

LOG_SCALE_RATIO = 30
"""Gradient norms whose largest is more than this times the smallest are drawn on a logarithmic axis."""
EVAL_COLORS = ("c2", "c3", "c4", "c5")
"""Of the curves of evaluations, in turn."""


def curves(lines: Sequence[Line], unit: str) -> list[Chart]:
    """A chart of each metric that the lines have. `unit` is what the loss is averaged over: a token or an example."""
    norms = values(lines, "grad_norm")
    positive = [norm for _, norm in norms if norm > 0]
    log = bool(positive) and max(positive) > LOG_SCALE_RATIO * min(positive)
    loss = _raw_and_smooth(values(lines, "loss"))
    sets = []
    for (metric, label), color in zip(eval_losses(lines).items(), itertools.cycle(EVAL_COLORS)):
        series = Series(label, values(lines, metric), color, marked=True, lowest=True)
        if metric == HELDOUT_LOSS:
            loss.append(series)
        else:  # of other texts, whose losses may be far from those of training
            sets.append(Chart(f"{label} loss", [series], f"nats per {unit}"))
    charts = [
        Chart("loss", loss, f"nats per {unit}", wide=True),
        *sets,
        Chart("reward", _raw_and_smooth(values(lines, "reward")), "mean of all answers"),
        Chart("KL to the reference", _raw_and_smooth(values(lines, "kl")), "nats per token"),
        Chart("answer length", _raw_and_smooth(values(lines, "mean_completion_length")), "tokens", from_zero=True),
        Chart("learning rate", [Series("learning rate", values(lines, "lr"), "c1")], from_zero=True),
        Chart("gradient norm", _raw_and_smooth(norms), "log scale" if log else "", log=log),
        Chart("tokens per second", _raw_and_smooth(tokens_per_second(lines)), from_zero=True),
        Chart("memory", [Series("memory", values(lines, "memory_gb"), "c1")], "GB", from_zero=True),
        Chart("model FLOPs utilization (MFU)", _raw_and_smooth(values(lines, "mfu")), from_zero=True),
    ]
    drawn = [replace(chart, series=[series for series in chart.series if series.points]) for chart in charts]
    return [chart for chart in drawn if chart.series]


OVERLAY_COLORS = ("c1", *EVAL_COLORS)


def overlay(runs: Sequence[tuple[str, Sequence[Line]]]) -> list[Chart]:
    """The smoothed training losses and the held-out losses of several runs in one chart each, the first runs on top.

    Args:
        runs: Name and metrics of each, the best first. The first five have lines of different colors, the next five
            dashed ones.
    """
    charts = []
    for metric, title in (("loss", "training loss, smoothed"), (HELDOUT_LOSS, "held-out loss")):
        series = []
        for i, (name, lines) in enumerate(runs):
            color = OVERLAY_COLORS[i % len(OVERLAY_COLORS)] if i < 2 * len(OVERLAY_COLORS) else PALE
            points = values(lines, metric)
            points = points if metric == HELDOUT_LOSS else smooth(points)
            dashed, marked = i >= len(OVERLAY_COLORS), metric == HELDOUT_LOSS
            series.append(Series(name, points, color, marked=marked, dashed=dashed and color != PALE))
        if drawn := [x for x in series if x.points]:
            charts.append(Chart(title, drawn, "nats", wide=True))
    return charts


def evaluation_table(lines: Sequence[Line]) -> Table | None:
    """The losses of each evaluation beside that of training; None if none was computed."""
    metrics = eval_losses(lines)
    if not metrics:
        return None
    best = {metric: lowest(points)[0] for metric in metrics if (points := values(lines, metric))}
    training = dict(smooth(values(lines, "loss")))
    rows = []
    for line in lines:
        if not metrics.keys() & line.keys():
            continue
        step = line["step"]
        cells = [Cell(f"{step:,}", step), Cell(number(line.get("tokens", 0))), Cell(f"{training[step]:.4f}")]
        for metric in metrics:
            loss = line.get(metric)
            cells.append(Cell("" if loss is None else f"{loss:.4f}", is_best=best.get(metric) == step))
        rows.append(cells)
    heads = ["step", "tokens seen", "training, smoothed", *metrics.values()]
    return Table("losses of evaluations, in nats", [Column(head) for head in heads], rows)


def key_numbers(lines: Sequence[Line], run: Mapping[str, Any], parameters: Any = None) -> list[tuple[str, str, str]]:
    """The numbers that sum a training up: name, value, and a note on it.

    Args:
        lines: Those of metrics.jsonl.
        run: The fields of the recipe.
        parameters: How many parameters are trained, and of how many, if status.json says so.
    """
    numbers = []
    if loss := values(lines, "loss"):
        first_step, first_loss = loss[0]
        numbers.append(
            ("training loss", f"{smooth(loss)[-1][1]:.3f}", f"smoothed, last; {first_loss:.3f} at step {first_step:g}")
        )
    for metric, label in eval_losses(lines).items():
        if points := values(lines, metric):
            step, best = lowest(points)
            numbers.append((f"{label} loss", f"{points[-1][1]:.3f}", f"last; best {best:.3f} at step {step:g}"))
    if rates := values(lines, "lr"):
        step, peak = max(rates, key=lambda point: point[1])
        numbers.append(("peak learning rate", number(peak), f"at step {step:g}; {run.get('optimizer', 'adamw')}"))
    if share := trained_share(parameters):
        numbers.append(share)
    if tokens := values(lines, "tokens"):
        numbers.append(("tokens seen", number(tokens[-1][1]), "padding included"))
    if speeds := tokens_per_second(lines):
        median = statistics.median(speed for _, speed in speeds)
        numbers.append(("tokens per second", number(round(median)), "median over steps"))
    if seconds := values(lines, "seconds"):
        numbers.append(("time", duration(seconds[-1][1]), "training steps alone"))
    if spent := values(lines, "epsilon"):
        numbers.append(("epsilon", f"{spent[-1][1]:.3f}", f"privacy spent after step {spent[-1][0]:g}"))
    if memory := values(lines, "memory_gb"):
        numbers.append(("memory", f"{max(gb for _, gb in memory):.2f} GB", "peak"))
    return numbers


def trained_share(parameters: Any) -> tuple[str, str, str] | None:
    """The share of the parameters that is trained, as a key number; None if it is not recorded.

    >>> trained_share({"trained": 25, "total": 1000})
    ('trainable', '2.5 %', '25 of 1,000 parameters')
    """
    if not isinstance(parameters, Mapping):
        return None
    trained, total = parameters.get("trained"), parameters.get("total")
    if not isinstance(trained, int) or not isinstance(total, int) or total < 1:
        return None
    return "trainable", percent(trained / total), f"{trained:,} of {total:,} parameters"


def values(lines: Sequence[Line], name: str) -> list[Point]:
    """(step, value) of one metric, for the lines that have it as a finite number."""
    pairs = ((line["step"], line.get(name)) for line in lines)
    return [(step, value) for step, value in pairs if isinstance(value, int | float) and math.isfinite(value)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """The exponential moving average of the values, at the same steps."""
    averages = ema([value for _, value in points])
    return [(step, average) for (step, _), average in zip(points, averages, strict=True)]


def tokens_per_second(lines: Sequence[Line]) -> list[Point]:
    """(step, tokens per second of that step alone). If the counters start again from zero, so do the differences."""
    points, tokens, seconds = [], 0.0, 0.0
    for line in lines:
        if not all(isinstance(line.get(name), int | float) for name in ("tokens", "seconds")):
            continue
        if line["tokens"] <= tokens or line["seconds"] <= seconds:
            tokens, seconds = 0.0, 0.0
        if line["seconds"] > seconds:
            points.append((line["step"], (line["tokens"] - tokens) / (line["seconds"] - seconds)))
        tokens, seconds = line["tokens"], line["seconds"]
    return points


def _raw_and_smooth(points: Sequence[Point]) -> list[Series]:
    return [Series("each step", points, PALE), Series("smoothed", smooth(points), "c1")]
