"""How a training went, from its metrics lines: charts, and the few figures that sum it up."""

import html
import math
import statistics
from collections.abc import Sequence

from fgpt.cli.metrics_log import Line
from fgpt.cli.report.chart import Point, Series, chart, number

KEEP = 0.95
"""Of a smoothed value, what stays of it from step to step."""

HELDOUT = "heldout_loss"


def curves(lines: Sequence[Line], unit: str) -> str:
    """A figure for each thing that the lines tell of; `unit` is what a loss is counted by."""
    loss, heldout = values(lines, "loss"), values(lines, HELDOUT)
    by_step = [Series("each step", loss, "raw"), Series("smoothed", smoothed(loss), "smooth")]
    held = [Series("held out", heldout, "dots")] if heldout else []
    norms, speeds = values(lines, "grad_norm"), pace(lines)
    positive = [y for _, y in norms if y > 0]
    steep = bool(positive) and max(positive) > 30 * min(positive)
    return "".join(
        [
            _figure("loss", [*by_step, *held], f"nats per {unit}", wide=True),
            _figure("learning rate", [Series("learning rate", values(lines, "lr"), "smooth")], zero=True),
            _figure("gradient norm", _both(norms), "log scale" if steep else "", logarithmic=steep),
            _figure("tokens per second", _both(speeds), zero=True),
            _figure("memory", [Series("memory", values(lines, "memory_gb"), "smooth")], "GB", zero=True),
            _figure("share of the machine's arithmetic (MFU)", _both(values(lines, "mfu")), zero=True),
        ]
    )


def figures(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """What sums a training up: a name, the figure, and what is to be known of it."""
    loss, heldout, speeds = values(lines, "loss"), values(lines, HELDOUT), pace(lines)
    found = []
    if loss:
        found += [
            ("loss", f"{smoothed(loss)[-1][1]:.3f}", f"smoothed, at the end; {loss[0][1]:.3f} at step {loss[0][0]:g}")
        ]
    if heldout:
        step, least = min(heldout, key=lambda p: p[1])
        found += [("held-out loss", f"{heldout[-1][1]:.3f}", f"the last; the least is {least:.3f}, at step {step:g}")]
    if speeds:
        found += [("tokens per second", number(round(statistics.median(y for _, y in speeds))), "the median step's")]
    if tokens := values(lines, "tokens"):
        found += [("tokens", number(tokens[-1][1]), "read, padding included")]
    if seconds := values(lines, "seconds"):
        found += [("time", duration(seconds[-1][1]), "of training alone")]
    if memory := values(lines, "memory_gb"):
        found += [("memory", f"{max(y for _, y in memory):.2f} GB", "at most")]
    return found


def values(lines: Sequence[Line], name: str) -> list[Point]:
    """One of the figures, where a line has it and it is finite."""
    every = ((line["step"], line.get(name)) for line in lines)
    return [(step, x) for step, x in every if isinstance(x, int | float) and math.isfinite(x)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """An exponential mean, which owes nothing to where it began."""
    found, total, weight = [], 0.0, 0.0
    for x, y in points:
        total, weight = KEEP * total + (1 - KEEP) * y, KEEP * weight + 1 - KEEP
        found.append((x, total / weight))
    return found


def pace(lines: Sequence[Line]) -> list[Point]:
    """Each step's own tokens per second. Where the counters begin anew, so does the difference."""
    found, tokens, seconds = [], 0.0, 0.0
    for line in lines:
        if not all(isinstance(line.get(name), int | float) for name in ("tokens", "seconds")):
            continue
        if line["tokens"] <= tokens or line["seconds"] <= seconds:
            tokens, seconds = 0.0, 0.0
        if line["seconds"] > seconds:
            found.append((line["step"], (line["tokens"] - tokens) / (line["seconds"] - seconds)))
        tokens, seconds = line["tokens"], line["seconds"]
    return found


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s or 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{seconds:.0f} s"


def _both(points: Sequence[Point]) -> list[Series]:
    return [Series("each step", points, "raw"), Series("smoothed", smoothed(points), "smooth")]


def _figure(
    title: str,
    series: Sequence[Series],
    unit: str = "",
    wide: bool = False,
    zero: bool = False,
    logarithmic: bool = False,
) -> str:
    """A chart with its title and what its lines are; nothing where the lines do not tell of it."""
    if not any(s.points for s in series):
        return ""
    drawn = chart(title, series, 1000 if wide else 540, zero, logarithmic)
    keys = (
        "".join(f'<span class="key {s.look}">{html.escape(s.name)}</span>' for s in series) if len(series) > 1 else ""
    )
    about = f' <span class="note">{html.escape(unit)}</span>' if unit else ""
    kind = "curve broad" if wide else "curve"
    return f'<figure class="{kind}"><figcaption><b>{html.escape(title)}</b>{about}{keys}</figcaption>{drawn}</figure>'
