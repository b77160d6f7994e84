"""The run directory of a finished training."""

from pathlib import Path

import pytest
from builders.reports import comparison_with, write_run_dir

from fgpt.cli import environment


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A finished run with every part."""
    status, machine = {"state": "finished", "steps": 60}, environment.environment()
    evaluated = {"evaluated": "x", "held out": {"rows": 64, "response loss (nats per token)": 1.25}}
    parts = {"status": status, "environment": machine, "compare": comparison_with(), "eval": evaluated}
    return write_run_dir(tmp_path / "lora-nano", **parts)
