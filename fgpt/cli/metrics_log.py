"""metrics.jsonl: a line of JSON for each step, appended and never overwritten."""

import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgpt.cli.figures import escape_mathtext, save_png
from fgpt.errors import InputError, printable, short_repr

Line = dict[str, Any]


HELDOUT_LOSS = "heldout_loss"
"""The loss of the rows that were held out of the training data."""
EVAL_LOSS = re.compile(r"eval_(?P<name>.+)_loss")
"""The loss of an evaluation set, named as transformers does."""

FINITE = ("loss", "grad_norm", "tokens", "seconds")
"""Metrics that must be finite; every line has a loss."""

LONGEST_LINE = 1 << 16
"""Bytes."""


def eval_loss(name: str) -> str:
    """What metrics call the loss of an evaluation set.

    >>> eval_loss("news")
    'eval_news_loss'
    """
    return f"eval_{name}_loss"


def eval_losses(lines: Sequence[Line]) -> dict[str, str]:
    """The losses of evaluations in the lines, held-out rows first: the name of each metric, and what it is of.

    >>> eval_losses([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0, "eval_news_loss": 3.0, "heldout_loss": 4.0}])
    {'heldout_loss': 'held-out', 'eval_news_loss': 'news'}
    """
    metrics = dict.fromkeys(name for line in lines for name in line)
    heldout = {HELDOUT_LOSS: loss_label(HELDOUT_LOSS)} if HELDOUT_LOSS in metrics else {}
    return heldout | {metric: loss_label(metric) for metric in metrics if EVAL_LOSS.fullmatch(metric)}


def loss_label(metric: str) -> str:
    """What the loss of an evaluation is of: held-out, or the name of its set."""
    match = EVAL_LOSS.fullmatch(metric)
    return match["name"] if match else "held-out"


def read_metrics(metrics_file: Path) -> list[Line]:
    """The metrics of each step, in order. Of a step that was repeated after a kill it is the later line; a last line
    that was cut off is left out.

    Raises InputError for a damaged line.
    """
    if not metrics_file.exists():
        return []
    by_step: dict[int, Line] = {}
    text = metrics_file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n")[:-1], 1):
        row = _parse_line(line, f"{metrics_file}: line {number}")
        by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]


def last_metrics(metrics_file: Path) -> Line:
    """The last whole line, without reading the others; empty if there is none. Raises InputError if it is damaged."""
    if not metrics_file.exists():
        return {}
    with open(metrics_file, "rb") as file:
        file.seek(max(0, metrics_file.stat().st_size - LONGEST_LINE))
        lines = file.read().decode("utf-8", "replace").split("\n")[:-1]
    return _parse_line(lines[-1], f"{metrics_file}: the last line") if lines else {}


def _parse_line(text: str, where: str) -> Line:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is damaged: delete it") from None
    if problem := _problem_of(line):
        raise InputError(f"{where} is damaged ({problem}): delete it")
    return line


def _problem_of(row: Any) -> str:
    """What is wrong with a line; empty if it is a line of metrics."""
    if not isinstance(row, dict):
        return f"expected an object, got {short_repr(row)}"
    step = row.get("step")
    if type(step) is not int or not 1 <= step < 1 << 53:
        return f"its step is {short_repr(step)}: expected an integer of 1 or more"
    for name in FINITE:
        if (name in row or name == "loss") and not (_is_number(row.get(name)) and math.isfinite(row[name])):
            return f"its {name} is {short_repr(row.get(name))}: expected a finite number"
    for name, value in row.items():
        if not _is_number(value):
            return f"its {printable(name)} is {short_repr(value)}: expected a number"
    return ""


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 53)


def truncate_partial_line(metrics_file: Path) -> None:
    """Delete a last line that was cut off, so that the next one starts a new line."""
    if metrics_file.exists() and not (data := metrics_file.read_bytes()).endswith(b"\n"):
        os.truncate(metrics_file, data.rfind(b"\n") + 1)


def ema(values: Sequence[float], decay: float = 0.95) -> list[float]:
    """The exponential moving average, corrected for its start at zero as Adam's moments are.

    Source: Kingma and Ba 2015, section 3.
    """
    averages, total = [], 0.0
    for n, value in enumerate(values, 1):
        total = decay * total + (1 - decay) * value
        averages.append(total / (1 - decay**n))
    return averages


EVAL_COLORS = ("#b4611a", "#2e8a57", "#8a4fb0", "#b03a56")
"""Of the curves of evaluations: the held-out rows', then those of the evaluation sets."""


def plot_loss(metrics_file: Path, picture: Path, title: str, unit: str = "token") -> None:
    """Plot the loss over steps, or the reward where there is one, raw and smoothed, to a PNG file; and the loss of each
    evaluation set, the best step marked. `unit` is what the loss is averaged over.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics_file)
    if not rows:
        return
    metric = "reward" if all("reward" in r for r in rows) else "loss"
    steps, values = [r["step"] for r in rows], [r[metric] for r in rows]
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.plot(steps, values, color="#b9c6d6", linewidth=1, label="each step")
    axes.plot(steps, ema(values), color="#1f5fa8", linewidth=2, label="smoothed")
    evaluations = {} if metric == "reward" else eval_losses(rows)
    for (name, label), color in zip(evaluations.items(), itertools.cycle(EVAL_COLORS)):
        points = [(row["step"], row[name]) for row in rows if name in row]
        step, best = min(points, key=lambda point: point[1])
        text = f"{escape_mathtext(label)}, best {best:.3f} at step {step}"
        axes.plot(*zip(*points), color=color, marker="o", markersize=4, label=text)
        axes.plot(step, best, color=color, marker="o", markersize=9, fillstyle="none")
    y_label = "mean reward" if metric == "reward" else f"loss (nats per {unit})"
    title = f"{escape_mathtext(title)}: {metric} over {steps[-1]:,} steps"
    axes.set(title=title, xlabel="step", ylabel=y_label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save_png(figure, picture, 120)
