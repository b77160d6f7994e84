"""Several runs on one page: a table of them, each with a link to its report, and their losses in one chart."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from fgpt import recipes
from fgpt.cli import run_dir
from fgpt.cli.metrics_log import HELDOUT_LOSS, eval_losses
from fgpt.cli.pages import render
from fgpt.cli.pages.charts import lowest
from fgpt.cli.pages.formatting import count
from fgpt.cli.pages.tables import Cell, Column, Table, text_column
from fgpt.cli.report.curves import overlay, smooth, values
from fgpt.cli.report.run_data import RunData
from fgpt.cli.report.sections import ending, method
from fgpt.cli.run_json import read_run
from fgpt.errors import InputError

COLUMNS = [
    *(text_column(name) for name in ("run", "recipe", "base", "adapter")),
    *(Column(name) for name in ("steps", "loss", "held-out loss", "best")),
    *(text_column(name) for name in ("date", "state")),
]


def runs_page(
    title: str,
    runs: Sequence[RunData],
    place: Path,
    *,
    summary: str = "",
    unreadable: Sequence[tuple[str, str]] = (),
    sweeps: Sequence[Path] = (),
) -> str:
    """The page as HTML.

    Args:
        title: Its title.
        summary: A line below it.
        runs: What it shows, in this order; each has a report in its directory.
        place: The folder that the page is written into, which its links start from.
        unreadable: The names of the runs that could not be read, and why.
        sweeps: The folders of sweeps, to which it links.
    """
    labels = _labels([data.folder for data in runs])
    return render(
        "runs.html",
        [Path(__file__).parent / "templates"],
        title=title,
        summary=summary,
        charts=overlay([(label, data.lines) for label, data in zip(labels, runs, strict=True)]),
        table=Table("runs", COLUMNS, [_row(label, data, place) for label, data in zip(labels, runs, strict=True)]),
        unreadable=unreadable,
        num_unreadable=count(len(unreadable), "run"),
        sweeps=[(folder.name, link(folder / run_dir.REPORT, place)) for folder in sweeps],
    )


def link(page: Path, place: Path) -> str:
    """The address of a page from another one in the folder `place`.

    >>> link(Path("runs/a b/report.html"), Path("runs"))
    'a%20b/report.html'
    """
    return quote(Path(os.path.relpath(page.resolve(), place.resolve())).as_posix())


def _row(label: str, data: RunData, place: Path) -> list[Cell]:
    status = data.status or {}
    base, adapter = method(data)
    step = data.lines[-1]["step"] if data.lines else 0
    steps = f"{step:,} of {status['steps']:,}" if isinstance(status.get("steps"), int) else f"{step:,}"
    loss = smooth(values(data.lines, "loss"))
    time = data.last_write or (data.folder / run_dir.RUN).stat().st_mtime
    state = ending(data)
    return [
        Cell(label, href=link(data.folder / run_dir.REPORT, place)),
        Cell(_recipe_name(data)),
        Cell(base),
        Cell(adapter),
        Cell(steps, step),
        Cell(f"{loss[-1][1]:.4f}" if loss else ""),
        *_heldout_cells(data),
        Cell(f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M}"),
        Cell(state.state, color=state.color),
    ]


def _recipe_name(data: RunData) -> str:
    """The recipe that a run was made from; of a run.json that this version cannot read, the run's own name."""
    if data.name in recipes.RECIPES:
        return data.name
    try:
        return recipes.nearest(read_run(data.folder))
    except InputError:
        return data.name


def _heldout_cells(data: RunData) -> tuple[Cell, Cell]:
    """The last and the best held-out loss; of a run that held nothing out, those of its first evaluation set."""
    metric, label = next(iter(eval_losses(data.lines).items()), (HELDOUT_LOSS, ""))
    losses = values(data.lines, metric)
    if not losses:
        return Cell(""), Cell("")
    last, (step, best) = losses[-1][1], lowest(losses)
    last_cell = Cell(f"{last:.4f}", last, note="" if metric == HELDOUT_LOSS else label)
    return last_cell, Cell(f"{best:.4f}", best, note=f"at step {step:g}")


def _labels(folders: Sequence[Path]) -> list[str]:
    """The names of the directories, after those of the folders that they are in if two are alike."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return ["/".join(folder.resolve().parts[-2:]) for folder in folders]
