"""What a run has measured, as tables in Markdown: from the files of its directory."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from fgpt.cli import run_dir
from fgpt.cli.metrics_log import eval_losses, read_metrics
from fgpt.cli.paths import without_paths
from fgpt.io.files import read_json

LAST_SHARE = 10
"""The training loss is the mean of the last tenth of the steps."""


def training_figures(folder: Path) -> dict[str, str]:
    """Steps, tokens and losses at the end of a training; nothing if it has written no metrics."""
    lines = read_metrics(folder / run_dir.METRICS)
    if not lines:
        return {}
    last = lines[-max(1, len(lines) // LAST_SHARE) :]
    figures = {"steps": f"{lines[-1]['step']:,}"}
    if "tokens" in lines[-1]:
        figures["tokens, padding included"] = f"{lines[-1]['tokens']:,}"
    figures["training loss of the last tenth of the steps"] = number(fmean(line["loss"] for line in last))
    for metric, label in eval_losses(lines).items():
        value = next(line[metric] for line in reversed(lines) if metric in line)
        figures[f"{label} loss"] = number(value)
    return figures


def result_tables(folder: Path) -> list[str]:
    """A table for each file of results of a run's own settings."""
    tables: list[str] = []
    for name, read_sides in READERS.items():
        if (folder / name).is_file():
            content = read_json(folder / name)
            sides = read_sides(content) if isinstance(content, dict) else {}
            tables += [sides_table(sides)] if any(sides.values()) else []
    return tables


Sides = Mapping[str, Mapping[str, Any]]
"""The figures of each side, such as those of base and tuned model."""


def _scores(content: Mapping[str, Any]) -> Sides:
    """Of compare.json and metrics.json."""
    return _numbers(content.get("scores"))


def _before_and_after(content: Mapping[str, Any]) -> Sides:
    """Of result.json: the figures after the training, with those before it."""
    after = {name: x for name, x in content.items() if name != "before"}
    before = content.get("before")
    return _numbers({"before": before, "after": after} if before else {"held out": after})


def _groups(content: Mapping[str, Any]) -> Sides:
    """Of eval.json."""
    return _numbers({name: x for name, x in content.items() if name != "settings"})


READERS = {
    "compare.json": _scores,
    run_dir.SCORES: _scores,
    run_dir.RESULT: _before_and_after,
    run_dir.EVAL: _groups,
}


def _numbers(sides: Any) -> Sides:
    """The numbers of each side, without lists and texts."""
    if not isinstance(sides, Mapping):
        return {}
    return {
        str(side): {name: x for name, x in figures.items() if isinstance(x, int | float) and not isinstance(x, bool)}
        for side, figures in sides.items()
        if isinstance(figures, Mapping)
    }


def number(x: float) -> str:
    """A figure to four digits; of an integer all.

    >>> number(2.39114), number(1500), number(0.05)
    ('2.391', '1,500', '0.05')
    """
    return f"{x:,}" if isinstance(x, int) else f"{x:,.4g}"


def sides_table(sides: Sides) -> str:
    """A table with a row for each figure and a column for each side.

    >>> print(sides_table({"base": {"loss": 2.0}, "tuned": {"loss": 1.5}}))
    | | base | tuned |
    |---|---:|---:|
    | loss | 2 | 1.5 |
    """
    names = dict.fromkeys(name for figures in sides.values() for name in figures)
    rows = [[name, *(number(figures[name]) if name in figures else "" for figures in sides.values())] for name in names]
    return table(["", *sides], rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, figures on the right; without machine paths."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("|" + "|".join(_cell(x) for x in line) + "|" for line in lines)


def _cell(text: str) -> str:
    if set(text) <= set("-:") and text:
        return text
    shown = without_paths(" ".join(str(text).split())).replace("|", "\\|")
    return f" {shown} " if shown else " "
