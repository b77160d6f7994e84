"""A training's figures, metrics.jsonl: a JSON line a step, appended and never written over."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgpt.cli.figures import plain, save
from fgpt.errors import InputError, printable, shown

Line = dict[str, Any]


FINITE = ("loss", "grad_norm", "tokens", "seconds")
"""What is a finite number where a line has it; the loss every line has."""


def read_metrics(metrics_file: Path) -> list[Line]:
    """A dict a step. Of a step that was taken again after a kill it is the later one's; a last line that was cut off is
    left out.

    Raises InputError for a line that is none of ours.
    """
    if not metrics_file.exists():
        return []
    found: dict[int, Line] = {}
    text = metrics_file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{metrics_file}: line {number} is damaged: take it out") from None
        if wrong := _wrong(row):
            raise InputError(f"{metrics_file}: line {number} is damaged ({wrong}): take it out")
        found[row["step"]] = row
    return [found[step] for step in sorted(found)]


def _wrong(row: Any) -> str:
    """What makes a line none of ours; nothing where it is one."""
    if not isinstance(row, dict):
        return f"expected an object, got {shown(row)}"
    step = row.get("step")
    if type(step) is not int or not 1 <= step < 1 << 53:
        return f"its step is {shown(step)}: expected a whole number from 1"
    for name in FINITE:
        if (name in row or name == "loss") and not (_is_number(row.get(name)) and math.isfinite(row[name])):
            return f"its {name} is {shown(row.get(name))}: expected a finite number"
    if odd := [name for name, x in row.items() if not _is_number(x)]:
        return f"its {printable(odd[0])} is {shown(row[odd[0]])}: expected a number"
    return ""


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 53)


def truncate_partial_line(metrics_file: Path) -> None:
    """Take off a last line that was cut off, so that the next is a line of its own."""
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


def plot_loss(metrics_file: Path, picture: Path, title: str, unit: str = "token") -> None:
    """Draw loss over steps, raw and smoothed, from a metrics file. `unit` is what has the weight 1."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics_file)
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.plot(steps, losses, color="#b9c6d6", linewidth=1, label="each step")
    axes.plot(steps, ema(losses), color="#1f5fa8", linewidth=2, label="smoothed")
    axes.set(title=plain(title), xlabel="step", ylabel=f"loss (nats per {unit})")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save(figure, picture, 120)
