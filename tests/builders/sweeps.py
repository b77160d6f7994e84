"""Members of a sweep, as its page shows them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from builders.reports import write_lines
from fgpt.cli.sweep.members import Member


def sweep_members(folder: Path) -> list[Member]:
    """A member that finished, one that was stopped and one that failed at once."""
    members = []
    task: Any = SimpleNamespace(job=SimpleNamespace(steps=30))
    for i, (state, why, steps) in enumerate([("finished", "", 30), ("stopped", "2 of 3", 12), ("failed", "nan", 0)]):
        at = folder / f"lr-{i}-seed-0"
        at.mkdir()
        write_lines(at / "metrics.jsonl", steps, loss=3.0 + i)
        initial: Any = None
        member = Member({"--lr": f"{i + 1}e-3", "--seed": "0"}, task, at, initial, state, why)
        member.read_lines()
        members.append(member)
    return members
