"""sweep.json, and what it says as tables: the members by their losses, and mean and spread over seeds."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from rich.table import Table
from rich.text import Text

from fgpt.cli.run_dir import SWEEP
from fgpt.cli.sweep.grid import SWEPT
from fgpt.cli.sweep.members import Member, MemberState
from fgpt.cli.sweep.pruners import PrunerName
from fgpt.errors import InputError, short_repr
from fgpt.io.files import read_json, write_json


def write_results(folder: Path, header: Mapping[str, Any], members: Sequence[Member]) -> None:
    """Write sweep.json: what was asked for, and how each member stands."""
    write_json(folder / SWEEP, dict(header) | {"members": [member.to_json() for member in members]})


def read_results(folder: Path) -> dict[str, Any]:
    """sweep.json of a sweep's folder. Raises InputError if it is none."""
    if not (folder / SWEEP).is_file():
        raise InputError(f"{folder} holds no {SWEEP}: expected the folder of a sweep, such as runs/lora-nano-sweep")
    results = read_json(folder / SWEEP)
    if problem := _problem_of(results):
        raise InputError(f"{folder / SWEEP} is damaged or of another version ({problem}): begin a new sweep")
    return results


FIELDS = {
    "recipe": str,
    "command": str,
    "members": list,
    "group_size": int | None,
    "groups": dict,
    "pruner": str,
    "rungs": dict,
    "reduction_factor": int,
    "min_steps": int | None,
}
MEMBER_FIELDS = {"name": str, "values": dict, "state": str, "why": str, "steps": int, "heldout_loss": float | None}


def _problem_of(results: Any) -> str:
    """What is wrong with a sweep.json; empty if nothing is."""
    if not isinstance(results, dict):
        return "expected an object"
    for name, kind in FIELDS.items():
        if not isinstance(results.get(name), kind):
            return f"its {name} is {short_repr(results.get(name))}"
    if results["pruner"] not in get_args(PrunerName):
        return f"its pruner is {short_repr(results['pruner'])}"
    size, fitting = results["group_size"], results.get("fitting", 1)
    is_size = (size is None or size >= 1) and isinstance(fitting, int) and fitting >= 1
    if not results["members"] or results["reduction_factor"] < 2 or not is_size:
        return "no members, or a number that no sweep has"
    for entry in results["members"]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), t) for k, t in MEMBER_FIELDS.items()):
            return f"a member is {short_repr(entry)}"
        if entry["state"] not in get_args(MemberState) or Path(entry["name"]).name != entry["name"]:
            return f"a member is {short_repr(entry)}"
    return ""


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
    """Those of members that finished."""
    of: int
    """Those of all members, stopped and failed ones too."""
    mean: float
    deviation: float
    """The sample's standard deviation; NaN of one member."""


def over_seeds(members: Sequence[Member]) -> list[Spread]:
    """Mean and spread of the losses of finished members over seeds, the best first; none if no seed was swept."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        if "--seed" in member.values:
            others = {option: value for option, value in member.values.items() if option != "--seed"}
            groups.setdefault(json.dumps(others), []).append(member)
    spreads: list[Spread] = []
    for key, same in groups.items():
        scores = [x.score for x in same if x.state == "finished" and math.isfinite(x.score)]
        mean = statistics.fmean(scores) if scores else math.nan
        deviation = statistics.stdev(scores) if len(scores) > 1 else math.nan
        spreads.append(Spread(json.loads(key), len(scores), len(same), mean, deviation))
    return sorted(spreads, key=lambda spread: spread.mean if spread.seeds else math.inf)


def spread_cells(spread: Spread) -> tuple[str, str, str]:
    """Seeds, mean and deviation in words; a dash for what is not known."""
    seeds = str(spread.of) if spread.seeds == spread.of else f"{spread.seeds} of {spread.of}"
    mean, deviation = ("-" if math.isnan(x) else f"{x:.4f}" for x in (spread.mean, spread.deviation))
    return seeds, mean, deviation


def spread_table(spreads: Sequence[Spread]) -> Table:
    options = list(spreads[0].values)
    view = Table(*(SWEPT[option] for option in options), "seeds", "mean loss", "±", title="over seeds")
    view.title_justify = "left"
    for column in view.columns:
        column.justify = "right"
    for spread in spreads:
        view.add_row(*spread.values.values(), *spread_cells(spread))
    return view
