"""A sweep on one page: the members, their curves, mean and spread over seeds.

report.html    in the folder of the sweep; it needs no other file and no network
"""

from collections.abc import Sequence
from pathlib import Path

from fgpt.cli import run_dir
from fgpt.cli.pages import render
from fgpt.cli.pages.tables import Cell, Column, Table, text_column
from fgpt.cli.report.curves import overlay
from fgpt.cli.sweep.grid import SWEPT
from fgpt.cli.sweep.members import Member
from fgpt.cli.sweep.results import Spread, in_rank_order, over_seeds, spread_cells, winner
from fgpt.io.files import write

TEMPLATES = Path(__file__).parent / "templates"


def write_page(folder: Path, title: str, summary: str, members: Sequence[Member], command: str) -> Path:
    """Write the page, and return its path."""
    path = folder / run_dir.REPORT
    write(path, page(title, summary, members, command))
    return path


def page(title: str, summary: str, members: Sequence[Member], command: str) -> str:
    """The page as HTML."""
    in_order = in_rank_order(members)
    return render(
        "sweep.html",
        [TEMPLATES],
        title=title,
        summary=summary,
        members=_members(in_order, winner(members)),
        charts=overlay([(member.name, member.lines) for member in in_order]),
        spreads=_spreads(over_seeds(members)),
        command=command,
    )


def _members(in_order: Sequence[Member], best: Member | None) -> Table:
    """The members, the best first: their values, steps, losses and states."""
    rows = []
    for member in in_order:
        heldout = "" if member.heldout_loss is None else f"{member.heldout_loss:.4f}"
        rows.append(
            [
                *(Cell(value) for value in member.values.values()),
                Cell(f"{member.step} of {member.job.steps}", member.step),
                Cell(f"{member.smoothed_loss:.4f}" if member.lines else ""),
                Cell(heldout, is_best=member is best),
                Cell("best" if member is best else member.state, note=member.why),
            ]
        )
    options = [Column(SWEPT[option]) for option in in_order[0].values]
    heads = [*options, Column("step"), Column("loss"), Column("held-out loss"), text_column("state")]
    return Table("members of the sweep, the best first", heads, rows)


def _spreads(spreads: Sequence[Spread]) -> Table | None:
    """Mean and spread over seeds; None if no seed was swept."""
    if not spreads:
        return None
    rows = [[Cell(text) for text in (*spread.values.values(), *spread_cells(spread))] for spread in spreads]
    heads = [SWEPT[option] for option in spreads[0].values] + ["seeds", "mean loss", "standard deviation"]
    return Table("mean and standard deviation over seeds", [Column(head) for head in heads], rows)
