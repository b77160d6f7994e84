"""Options of a training that takes seconds, its one line of error, and a run that was interrupted."""

import json
import shutil
from pathlib import Path

import pytest

SHORT_TRAINING = ["--steps", "6", "--micro-batch-size", "2", "--compare-prompts", "4", "--max-new-tokens", "24"]
"""Enough to train, save and compare in seconds."""


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr().err.strip().splitlines()
    assert output[-1].startswith("error: ")
    assert len(output) == 1, output
    return output[0]


def copy_interrupted(run: Path, copy: Path, after: int) -> None:
    """`run`, which has a checkpoint of each step, as if it had been interrupted after a step, in the folder `copy`."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > after:
            shutil.rmtree(checkpoint)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:after]))
    status = json.loads((copy / "status.json").read_text())
    (copy / "status.json").write_text(json.dumps(status | {"state": "interrupted"}))
