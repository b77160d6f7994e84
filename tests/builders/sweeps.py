"""Members of a sweep, as its page shows them."""

from pathlib import Path
from unittest.mock import Mock

import torch

import fgpt
from builders.reports import write_lines
from fgpt.cli.sweep.members import Member, MemberState
from fgpt.cli.tasks import Task
from fgpt.cli.training.job import TrainingJob


def sweep_members(folder: Path) -> list[Member]:
    """A member that finished, one that was stopped and one that failed at once."""
    members = []
    initial = fgpt.init_state({"w": torch.zeros(2)}, fgpt.adamw(0.1))
    task = Mock(spec=Task, job=Mock(spec=TrainingJob, steps=30))
    states: list[tuple[MemberState, str, int]] = [("finished", "", 30), ("stopped", "2 of 3", 12), ("failed", "nan", 0)]
    for i, (state, why, steps) in enumerate(states):
        at = folder / f"lr-{i}-seed-0"
        at.mkdir()
        write_lines(at / "metrics.jsonl", steps, loss=3.0 + i)
        member = Member({"--lr": f"{i + 1}e-3", "--seed": "0"}, task, at, initial, state, why)
        member.read_lines()
        members.append(member)
    return members
