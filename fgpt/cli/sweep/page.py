"""A sweep on one page: the members, their curves, mean and spread over seeds.

report.html    in the folder of the sweep; it needs no other file and no network
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgpt.cli.evaluation.compare.html import render
from fgpt.cli.metrics_log import HELDOUT_LOSS
from fgpt.cli.report import REPORT
from fgpt.cli.report import TEMPLATES as REPORT_TEMPLATES
from fgpt.cli.report.curves import smooth, values
from fgpt.cli.report.plots import EVAL_COLORS, Plot, Series
from fgpt.cli.sweep.grid import SWEPT
from fgpt.cli.sweep.members import Member
from fgpt.cli.sweep.results import in_rank_order, over_seeds, spread_cells, winner
from fgpt.io.files import write

TEMPLATES = Path(__file__).parent / "templates"
COLORS = ("smooth", *EVAL_COLORS)
"""Of the best members."""
PALE = "raw"
"""Of all others."""


def write_page(folder: Path, title: str, summary: str, members: Sequence[Member], command: str) -> Path:
    """Write the page, and return its path."""
    path = folder / REPORT
    write(path, page(title, summary, members, command))
    return path


def page(title: str, summary: str, members: Sequence[Member], command: str) -> str:
    """The page as HTML."""
    in_order, best = in_rank_order(members), winner(members)
    css = (REPORT_TEMPLATES / "report.css").read_text(encoding="utf-8")
    return render(
        "sweep.html",
        TEMPLATES,
        title=title,
        summary=summary,
        report_css=css,
        options=[SWEPT[option] for option in members[0].values],
        rows=[_row(member, member is best) for member in in_order],
        plots=_plots(in_order),
        spreads=[[*spread.values.values(), *spread_cells(spread)] for spread in over_seeds(members)],
        command=command,
        pale=PALE,
    )


def _row(member: Member, is_best: bool) -> dict[str, Any]:
    return {
        "values": list(member.values.values()),
        "step": f"{member.step} of {member.job.steps}",
        "loss": f"{member.smoothed_loss:.4f}" if member.lines else "",
        "heldout": "" if member.heldout_loss is None else f"{member.heldout_loss:.4f}",
        "state": member.state,
        "why": member.why,
        "is_best": is_best,
    }


def _plots(in_order: Sequence[Member]) -> list[Plot]:
    """The smoothed losses and the held-out losses over steps, the best member on top."""
    losses: list[Series] = []
    heldout: list[Series] = []
    for i, member in enumerate(in_order):
        color = COLORS[i] if i < len(COLORS) else PALE
        losses.append(Series(member.name, smooth(values(member.lines, "loss")), color, marked=False))
        heldout.append(Series(member.name, values(member.lines, HELDOUT_LOSS), color, marked=True))
    plots = [Plot("loss", losses[::-1], "nats, smoothed", wide=True), Plot("held-out loss", heldout[::-1], "nats")]
    drawn = [Plot(p.title, [s for s in p.series if s.points], p.unit, p.wide) for p in plots]
    return [plot for plot in drawn if plot.series]
