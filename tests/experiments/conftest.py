"""The instructions of nano."""

import pytest
from builders import ROOT

from fgpt.cli.training.nano_rows import Task, read_tasks

NANO = ROOT / "fgpt" / "nano"


@pytest.fixture(scope="session")
def tasks() -> list[Task]:
    return read_tasks(NANO / "tasks.jsonl")
