"""The held-out curve of a training that names no --eval-every, and the epoch of each step."""

import itertools
import json
import math
from pathlib import Path

import pytest
from builders.tiny_training import tiny_job

from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training.loop import evaluation_is_due

OPTIONS = ["--micro-batch-size", "2", "--num-heldout", "4", "--compare-prompts", "0", "--max-seq-len", "64"]


def train(file: Path, out: Path, *options: str) -> Path:
    assert main(["train", "lora-nano", "--data", str(file), *OPTIONS, *options, "--out", str(out)]) == 0
    return out / "lora-nano"


@pytest.mark.slow
def test_ten_evaluations_and_the_epoch_of_each_step(instruction_file: Path, tmp_path: Path):
    run = train(instruction_file, tmp_path, "--steps", "22")
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "heldout_loss" in line] == [3, 6, 9, 12, 15, 18, 21, 22]
    losses = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    assert losses[-1] < losses[0]
    per_epoch = 1 / lines[0]["epoch"]
    assert per_epoch == pytest.approx(round(per_epoch), rel=1e-3)
    assert [line["epoch"] for line in lines] == pytest.approx([i / round(per_epoch) for i in range(1, 23)], abs=1e-4)
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert names == ["step-000022"]  # a curve is no reason to keep the best state
    assert json.loads((run / "run.json").read_text())["eval_every"] == "auto"


@pytest.mark.slow
def test_no_evaluation_where_there_is_nothing_to_see(instruction_file: Path, tmp_path: Path):
    for i, options in enumerate((["--steps", "6"], ["--steps", "20", "--eval-every", "None"])):
        run = train(instruction_file, tmp_path / str(i), *options)
        assert not any("heldout_loss" in line for line in read_metrics(run / "metrics.jsonl"))


@pytest.mark.slow
def test_a_short_training_whose_result_depends_on_it_is_evaluated(instruction_file: Path, tmp_path: Path):
    run = train(instruction_file, tmp_path, "--steps", "3", "--keep-best")
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "heldout_loss" in line] == [1, 2, 3]


@pytest.mark.parametrize("steps", [19, 20, 101, 328])
def test_which_steps_are_evaluated(steps: int):
    curves = {"heldout_loss": lambda params: 1.0}
    job = tiny_job(steps=steps, eval_losses=curves, eval_every="auto")
    due = [step for step in range(1, steps + 1) if evaluation_is_due(job, step)]
    if steps < 20:
        assert due == []
        return
    assert 5 <= len(due) <= 11
    assert due[-1] == steps
    assert {b - a for a, b in itertools.pairwise(due[:-1])} <= {math.ceil(steps / 10)}
    assert not evaluation_is_due(tiny_job(steps=steps, eval_every="auto"), steps)  # nothing is held out
