"""The course of a training, from its metrics: plots, and the numbers that sum it up."""

import itertools
import math
import statistics
from collections.abc import Sequence

from fgpt.cli.metrics_log import HELDOUT_LOSS, Line, ema, eval_losses
from fgpt.cli.report.formatting import duration, number
from fgpt.cli.report.plots import EVAL_COLORS, Plot, Point, Series

LOG_SCALE_RATIO = 30
"""Gradient norms whose largest is more than this times the smallest are drawn on a logarithmic axis."""


def curves(lines: Sequence[Line], unit: str) -> list[Plot]:
    """A plot of each metric that the lines have. `unit` is what the loss is averaged over: a token or an example."""
    norms = values(lines, "grad_norm")
    positive = [norm for _, norm in norms if norm > 0]
    log = bool(positive) and max(positive) > LOG_SCALE_RATIO * min(positive)
    loss = _raw_and_smooth(values(lines, "loss"))
    for (metric, label), color in zip(eval_losses(lines).items(), itertools.cycle(EVAL_COLORS)):
        name = "held out" if metric == HELDOUT_LOSS else label
        loss.append(Series(name, values(lines, metric), color))
    plots = [
        Plot("loss", [series for series in loss if series.points], f"nats per {unit}", wide=True),
        Plot("reward", _raw_and_smooth(values(lines, "reward")), "mean of all answers"),
        Plot("KL to the reference", _raw_and_smooth(values(lines, "kl")), "nats per token"),
        Plot("answer length", _raw_and_smooth(values(lines, "mean_completion_length")), "tokens", from_zero=True),
        Plot("learning rate", [Series("learning rate", values(lines, "lr"), "smooth")], from_zero=True),
        Plot("gradient norm", _raw_and_smooth(norms), "log scale" if log else "", log=log),
        Plot("tokens per second", _raw_and_smooth(tokens_per_second(lines)), from_zero=True),
        Plot("memory", [Series("memory", values(lines, "memory_gb"), "smooth")], "GB", from_zero=True),
        Plot("model FLOPs utilization (MFU)", _raw_and_smooth(values(lines, "mfu")), from_zero=True),
    ]
    return [plot for plot in plots if any(series.points for series in plot.series)]


def key_numbers(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """The numbers that sum a training up: name, value, and a note on it."""
    numbers = []
    if loss := values(lines, "loss"):
        first_step, first_loss = loss[0]
        numbers.append(
            ("loss", f"{smooth(loss)[-1][1]:.3f}", f"smoothed, at the end; {first_loss:.3f} at step {first_step:g}")
        )
    for metric, label in eval_losses(lines).items():
        if points := values(lines, metric):
            step, best = min(points, key=lambda point: point[1])
            numbers.append(
                (f"{label} loss", f"{points[-1][1]:.3f}", f"the last; the best is {best:.3f}, at step {step:g}")
            )
    if speeds := tokens_per_second(lines):
        median = statistics.median(speed for _, speed in speeds)
        numbers.append(("tokens per second", number(round(median)), "median over steps"))
    if tokens := values(lines, "tokens"):
        numbers.append(("tokens seen", number(tokens[-1][1]), "padding included"))
    if seconds := values(lines, "seconds"):
        numbers.append(("time", duration(seconds[-1][1]), "training steps alone"))
    if spent := values(lines, "epsilon"):
        numbers.append(("epsilon", f"{spent[-1][1]:.3f}", f"privacy spent after step {spent[-1][0]:g}"))
    if memory := values(lines, "memory_gb"):
        numbers.append(("memory", f"{max(gb for _, gb in memory):.2f} GB", "peak"))
    return numbers


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
    return [Series("each step", points, "raw"), Series("smoothed", smooth(points), "smooth")]
