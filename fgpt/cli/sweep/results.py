"""sweep.json, and what it says as tables: the members by their losses, and mean and spread over seeds."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from fgpt.cli.sweep.grid import SWEPT
from fgpt.cli.sweep.members import Member
from fgpt.errors import InputError
from fgpt.io.files import read_json, write_json

SWEEP = "sweep.json"


def write_results(folder: Path, header: Mapping[str, Any], members: Sequence[Member]) -> None:
    """Write sweep.json: what was asked for, and how each member stands."""
    write_json(folder / SWEEP, dict(header) | {"members": [member.to_json() for member in members]})


def read_results(folder: Path) -> dict[str, Any]:
    """sweep.json of a sweep's folder. Raises InputError if it is none."""
    if not (folder / SWEEP).is_file():
        raise InputError(f"{folder} holds no {SWEEP}: expected the folder of a sweep, such as runs/lora-nano-sweep")
    results = read_json(folder / SWEEP)
    fields = {"recipe": str, "members": list, "group_size": int | None, "pruner": str, "rungs": dict}
    fields |= {"reduction_factor": int, "min_steps": int | None}
    if not isinstance(results, dict) or not all(isinstance(results.get(k), t) for k, t in fields.items()):
        raise InputError(f"{folder / SWEEP} is not of this version: begin a new sweep")
    return results


def in_rank_order(members: Sequence[Member]) -> list[Member]:
    """The best first: those that took all their steps by their losses, then the stopped ones by how far they came."""
    order = {"finished": 0, "training": 1, "waiting": 1, "stopped": 2, "failed": 3}

    def rank(member: Member) -> tuple[Any, ...]:
        score = member.score if math.isfinite(member.score) else math.inf
        return order[member.state], -member.step if member.state == "stopped" else 0, score

    return sorted(members, key=rank)


def winner(members: Sequence[Member]) -> Member | None:
    """The member of the least loss of those that took all their steps."""
    finished = [member for member in members if member.state == "finished" and math.isfinite(member.score)]
    return min(finished, key=lambda member: member.score) if finished else None


def table(members: Sequence[Member], title: str, limit: int | None = None) -> Table:
    """The members, the best first: their values, step, losses and state."""
    options = list(members[0].values)
    view = Table(
        *(SWEPT[option] for option in options), "step", "loss", "held out", "state", title=title, title_justify="left"
    )
    for column in view.columns[: len(options) + 3]:
        column.justify = "right"
    shown = in_rank_order(members)[:limit]
    best = winner(members)
    for member in shown:
        heldout = "" if member.heldout_loss is None else f"{member.heldout_loss:.4f}"
        loss = f"{member.smoothed_loss:.4f}" if member.lines else ""
        style = "bold" if member is best else ""
        steps = f"{member.step}/{member.job.steps}"
        row = [*member.values.values(), steps, loss, heldout, "best" if member is best else member.state]
        view.add_row(*(Text(x, style) for x in row))
    if len(shown) < len(members):
        view.caption = f"and {len(members) - len(shown)} more"
    return view


class Spread(NamedTuple):
    """The members that differ in their seed alone."""

    values: dict[str, str]
    seeds: int
    mean: float
    deviation: float
    """The sample's standard deviation, 0 of one member."""


def over_seeds(members: Sequence[Member]) -> list[Spread]:
    """Mean and spread of the losses of finished members over seeds, the best first; none if no seed was swept."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        if "--seed" in member.values and member.state == "finished" and math.isfinite(member.score):
            others = {option: value for option, value in member.values.items() if option != "--seed"}
            groups.setdefault(json.dumps(others), []).append(member)
    spreads: list[Spread] = []
    for key, same in groups.items():
        scores = [member.score for member in same]
        deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
        spreads.append(Spread(json.loads(key), len(scores), statistics.fmean(scores), deviation))
    return sorted(spreads, key=lambda spread: spread.mean)


def spread_table(spreads: Sequence[Spread]) -> Table:
    options = list(spreads[0].values)
    view = Table(*(SWEPT[option] for option in options), "seeds", "mean loss", "±", title="over seeds")
    view.title_justify = "left"
    for column in view.columns:
        column.justify = "right"
    for spread in spreads:
        view.add_row(*spread.values.values(), str(spread.seeds), f"{spread.mean:.4f}", f"{spread.deviation:.4f}")
    return view
