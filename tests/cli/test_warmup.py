"""The warm-up that a recipe takes when nobody says how long."""

import dataclasses
from pathlib import Path

import pytest
from builders.command_line import training_options

from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training.build import warn_if_all_warmup
from fgpt.recipes import PretrainingRecipe, find
from fgpt.recipes.tuning import FineTuningRecipe, default_warmup


def test_a_warm_up_that_nobody_asked_for_is_a_tenth_at_most():
    """What is recorded of recipes stays: 20 of 328 updates, 3 of 30, 150 of 6,600, 800 of 6,000."""
    assert [default_warmup(20, steps) for steps in (1, 9, 30, 32, 199, 200, 328, 5000)] == [1, 1, 3, 4, 20, 20, 20, 20]
    lora, smol, nano, tiny = (find(x) for x in ("lora-nano", "lora-smollm2", "pretrain-nano", "tinytiny-pretrain"))
    assert isinstance(lora, FineTuningRecipe)
    assert isinstance(smol, FineTuningRecipe)
    assert isinstance(nano, PretrainingRecipe)
    assert isinstance(tiny, PretrainingRecipe)
    assert (lora.num_warmup_steps(328), smol.num_warmup_steps(30)) == (20, 3)
    assert (nano.num_warmup_steps(), tiny.num_warmup_steps()) == (150, 800)
    assert dataclasses.replace(nano, steps=60).num_warmup_steps() == 6


def test_a_short_training_comes_to_its_rate(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = [*training_options(project), "--compare-prompts", "0", "--lr", "6e-3", "--out", str(tmp_path)]
    assert main(["train", *args]) == 0
    assert max(line["lr"] for line in read_metrics(tmp_path / "lora-nano" / "metrics.jsonl")) == 6e-3
    assert "warmup" not in capsys.readouterr().err
    assert main(["train", *args, "--warmup-steps", "20"]) == 0  # asked for: as it is, and said
    assert max(line["lr"] for line in read_metrics(tmp_path / "lora-nano-2" / "metrics.jsonl")) == pytest.approx(9e-4)
    output = " ".join(capsys.readouterr().err.split())
    assert "it ends within its --warmup-steps 20: of lr 0.006 it reaches 0.0009" in output
    assert warn_if_all_warmup(1.0, 20, 20) == []
