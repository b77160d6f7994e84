"""A finished run with more steps: its course so far stays, and the recipe that it leaves makes all of it again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders.command_line import training_options
from builders.runs import one_line

from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training.optimizers import make_schedule
from fgpt.recipes import InstructionRecipe, find

QUICK = ["--compare-prompts", "0", "--quiet"]


@pytest.fixture(scope="module")
def lengthened(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lengthened")
    assert main(["train", *training_options(project), *QUICK, "--name", "long", "--out", str(out)]) == 0
    assert main(["train", str(out / "long"), "--resume", "--steps", "6", "--quiet"]) == 0
    return out / "long"


@pytest.mark.slow
def test_the_course_so_far_stays(lengthened: Path, project: Path, tmp_path: Path):
    assert main(["train", *training_options(project), *QUICK, "--name", "short", "--out", str(tmp_path)]) == 0
    short, long = read_metrics(tmp_path / "short" / "metrics.jsonl"), read_metrics(lengthened / "metrics.jsonl")
    assert len(short) == 3
    assert len(long) == 6
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in long[:3]] == [line[name] for line in short]
    status = json.loads((lengthened / "status.json").read_text())
    assert (status["state"], status["steps"]) == ("finished", 6)


def test_its_recipe_makes_it_again(lengthened: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = str(lengthened / "run.json")
    assert main(["train", "--config", config, "--out", str(tmp_path), "--quiet"]) == 0
    again, before = (read_metrics(run / "metrics.jsonl") for run in (tmp_path / "long", lengthened))
    assert [(line["step"], line["loss"], line["lr"]) for line in again] == [
        (line["step"], line["loss"], line["lr"]) for line in before
    ]
    capsys.readouterr()
    assert main(["replay", str(lengthened), "--step", "2"]) == 0  # with the schedule of that time


def test_what_cannot_be_lengthened(lengthened: Path, project: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main(["train", str(lengthened), "--resume"]) == 2
    assert "has finished; lengthen it by more --steps or --epochs" in one_line(capsys)
    assert main(["train", str(lengthened), "--resume", "--steps", "6", "--quiet"]) == 2
    assert "the run has finished its 6 steps, and 6 are no more" in one_line(capsys)
    assert main(["train", str(lengthened), "--resume", "--steps", "9", "--lr", "1", "--quiet"]) == 2
    assert "was started with --lr" in one_line(capsys)


def test_the_schedule_is_that_of_each_length_in_turn():
    recipe = find("lora-nano")
    assert isinstance(recipe, InstructionRecipe)
    twice = make_schedule(replace(recipe, lengthened_at=(40, 60)), 100)
    for end, steps in ((40, range(40)), (60, range(40, 60)), (100, range(60, 100))):
        alone = make_schedule(recipe, end)
        for step in steps:
            assert float(twice(torch.tensor(step))) == float(alone(torch.tensor(step)))
