"""--micro-batch-size auto: the largest micro-batch that fits, at the same update."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.train_command import recipe_with_options
from fgpt.cli.training.micro_batch import largest_fit
from fgpt.errors import InputError
from fgpt.io.files import write_json
from fgpt.recipes import FineTuningRecipe, find


class Memory:
    """A GPU on which n rows take `fixed + n * per_row` bytes, and more than `size` is too much."""

    def __init__(self, fixed: int, per_row: int, size: int) -> None:
        self.fixed, self.per_row, self.size = fixed, per_row, size
        self.tried: list[int] = []

    def peak(self, rows: int) -> int:
        self.tried.append(rows)
        if self.fixed + rows * self.per_row > self.size:
            raise torch.OutOfMemoryError
        return self.fixed + rows * self.per_row


@given(st.integers(1, 64), st.integers(0, 50), st.integers(1, 50), st.integers(1, 1000))
def test_it_is_the_largest_divisor_that_fits(rows: int, fixed: int, per_row: int, budget: int):
    memory = Memory(fixed, per_row, max(budget, fixed + per_row))
    found, _ = largest_fit(rows, memory.peak, budget)
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and fixed + n * per_row <= budget]
    assert found == max(fitting, default=1)
    assert len(memory.tried) <= 3


def test_what_does_not_fit_after_all_is_halved():
    """More rows take more than the first two showed."""

    def peak(rows: int) -> int:
        if rows > 8:
            raise torch.OutOfMemoryError
        return 10 * rows

    assert largest_fit(48, peak, 10_000) == (6, 10)
    assert largest_fit(48, lambda rows: rows if rows <= 12 else 10**6, 10_000)[0] == 12


def test_one_row_is_the_least():
    assert largest_fit(4, Memory(0, 10, 19).peak, 10_000)[0] == 1
    with pytest.raises(InputError, match="not even one row fits"):
        largest_fit(4, Memory(100, 10, 19).peak, 10_000)


def test_on_a_cpu_it_is_the_recipes_own(training_args: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = training_args["classify"]
    start = args.index("--micro-batch-size")
    args = [*args[:start], "--micro-batch-size", "auto", *args[start + 2 :], "--steps", "1", "--out", str(tmp_path)]
    assert main(["train", *args]) == 0
    assert "micro-batches of 4 rows (--micro-batch-size auto)" in " ".join(capsys.readouterr().err.split())
    run = json.loads((tmp_path / "emotion-small" / "run.json").read_text())
    assert (run["micro_batch_size"], run["grad_accumulation_steps"]) == (4, 2)


def test_elsewhere_the_update_keeps_its_rows():
    """Until the memory is measured, where the device is: meta stands for a GPU."""
    recipe = find("lora-medium")
    options = ["--micro-batch-size", "auto", "--grad-accumulation-steps", "8", "--device", "meta"]
    run = recipe_with_options("lora-medium", options, "fgpt train lora-medium")
    assert isinstance(recipe, FineTuningRecipe)
    assert isinstance(run, FineTuningRecipe)
    assert (recipe.micro_batch_size, recipe.grad_accumulation_steps) == (2, 2)
    assert (run.micro_batch_size, run.grad_accumulation_steps, run.rows_per_update) == ("auto", 16, 16)


@pytest.mark.slow
def test_the_same_training_and_its_numbers_in_the_run(
    training_args: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As on a GPU that holds four rows of the eight of an update."""
    train = training_args["classify"]
    options = [
        "--base",
        train[2],
        "--max-seq-len",
        "64",
        "--train",
        train[train.index("--train") + 1],
        "--test",
        "None",
    ]
    options += ["--num-heldout", "9", "--steps", "3", "--adapter.dropout", "0", "--out", str(tmp_path)]
    plain = ["--micro-batch-size", "1", "--grad-accumulation-steps", "8"]
    assert main(["train", "emotion-small", *options, *plain, "--name", "plain"]) == 0

    def choose(recipe: Any, device: torch.device, probe: Any) -> Any:
        probe(4)
        return replace(recipe, micro_batch_size=4, grad_accumulation_steps=recipe.rows_per_update // 4)

    monkeypatch.setattr("fgpt.cli.training.build.with_largest_micro_batch", choose)
    monkeypatch.setattr(
        "fgpt.cli.train_command._with_update_of", lambda _, run: replace(run, grad_accumulation_steps=8)
    )
    auto = ["--micro-batch-size", "auto", "--name", "auto"]
    assert main(["train", "emotion-small", *options, *auto]) == 0
    run = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert (run["micro_batch_size"], run["grad_accumulation_steps"]) == (4, 2)
    for a, b in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "auto")), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert b["weight"] == a["weight"]
    write_json(tmp_path / "auto" / "status.json", {"state": "interrupted", "steps": 3})
    capsys.readouterr()
    assert main(["train", "auto", "--micro-batch-size", "auto", "--resume", "--out", str(tmp_path)]) == 0
    assert "resuming after step 3 of 3" in " ".join(capsys.readouterr().err.split())
