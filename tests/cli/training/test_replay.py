"""Any step comes out as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics


def test_any_step_comes_out_as_it_was(checkpointed_run: Path, capsys: pytest.CaptureFixture[str]):
    """From the start, from a checkpoint just before it, and after the last; its rows are shown."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in (1, 4, 11, 12):
            assert main(["replay", str(checkpointed_run), "--step", str(step)]) == 0, capsys.readouterr().err
            output = capsys.readouterr().err
            assert f"step {step} of 12" in " ".join(output.split())
            assert "The number is" in output
            loss = next(
                line["loss"] for line in read_metrics(checkpointed_run / "metrics.jsonl") if line["step"] == step
            )
            assert output.count(repr(loss)) == 2
    finally:
        torch.set_num_threads(threads)


def test_a_step_that_comes_out_otherwise_is_told(
    checkpointed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = shutil.copytree(checkpointed_run, tmp_path / checkpointed_run.name)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[2]["loss"] += 1e-6
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["replay", str(run), "--step", "3"]) == 2
    assert "differs from the log (loss)" in capsys.readouterr().err
    assert main(["replay", str(run), "--step", "13"]) == 2
    assert "expected one from 1 to 12" in capsys.readouterr().err
