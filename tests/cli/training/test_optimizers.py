"""Optimizers, rates by paths and patterns of ranks on the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import same
from builders.command_line import training_options

import fgpt
from fgpt.cli import run_dir, tasks
from fgpt.cli.main import main
from fgpt.cli.training import checkpoints
from fgpt.io import models
from fgpt.recipes import find


def train(project: Path, out: Path, *options: str) -> Path:
    args = [*training_options(project), "--compare-prompts", "0", "--out", str(out), "--name", "run", *options]
    assert main(["train", *args]) == 0
    return out / "run"


@pytest.mark.parametrize(
    "options", [["--optimizer", "muon"], ["--optimizer", "schedule_free_adamw"], ["--ema-decay", "0.5"]], ids=str
)
def test_a_run_saves_what_its_optimizer_evaluates(options: list[str], project: Path, tmp_path: Path):
    """Of schedule-free AdamW, and with a moving average, the average, in the files, the held-out loss and the best
    state.
    """
    folder = train(project, tmp_path, *options, "--eval-every", "1", "--lr", "1e-2", "--keep-best")
    job = tasks.build_job(run_dir.read_run(folder))
    params = models.load(str(project / "base"))
    saved = fgpt.load_peft(folder / "adapter", params)
    state, losses = job.initial_state.take(), []
    batches = job.batches(0)
    states = []
    for step in range(job.steps):
        state, _ = job.train_step(state, next(batches), step)
        losses.append(job.eval_losses["heldout_loss"](job.evaluation_params(state)))
        states.append(state)
    best = states[min(range(job.steps), key=losses.__getitem__)]
    assert same(saved, job.evaluation_params(best))
    assert same(saved, best.trainable) == ("muon" in options)
    logged = [line["heldout_loss"] for line in run_dir_metrics(folder)]
    assert logged == pytest.approx(losses, abs=1e-6)
    assert checkpoints.least_loss(folder) == pytest.approx(min(losses), abs=1e-6)


def run_dir_metrics(folder: Path) -> list[Any]:
    from fgpt.cli.metrics_log import read_metrics

    return read_metrics(folder / run_dir.METRICS)


def test_the_rate_of_schedule_free_does_not_decay(project: Path, tmp_path: Path):
    folder = train(project, tmp_path, "--optimizer", "schedule_free_adamw", "--lr", "1e-2", "--warmup-steps", "2")
    assert [line["lr"] for line in run_dir_metrics(folder)] == [5e-3, 1e-2, 1e-2]


def test_multipliers_and_patterns_reach_the_training(project: Path, tmp_path: Path):
    options = ["--adapter.rs", "--adapter.rank", "4", "--adapter.rank-pattern", r".*\.up=2", r".*\.q=3"]
    options += ["--adapter.alpha-pattern", r".*\.up=5"]
    plain = train(project, tmp_path / "a", *options, "--steps", "1")
    plus = train(project, tmp_path / "b", *options, "--steps", "1", "--lr-multipliers", ".*/b=16")
    params = models.load(str(project / "base"))
    a, b = (fgpt.load_peft(x / "adapter", params) for x in (plain, plus))
    up, q, k = (a[f"blocks.0.{x}"] for x in ("mlp.up", "attn.q", "attn.k"))
    assert [(len(x.a), x.alpha, x.rs) for x in (up, q, k)] == [(2, 5.0, True), (3, 32.0, True), (4, 32.0, True)]
    for path in a:
        torch.testing.assert_close(b[path].a, a[path].a, rtol=0, atol=0)
        torch.testing.assert_close(b[path].b, 16 * a[path].b)  # B begins at 0, and one step is taken


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lr-multipliers", "b"], "--lr-multipliers 'b': expected REGEX=NUMBER"),
        (["--lr-multipliers", "none=2"], "lr_multipliers 'none' matches none of blocks.0.attn.q/a"),
        (["--adapter.rank-pattern", "none=2"], "rank_pattern 'none' matches none of blocks.0.attn.q"),
        (["--adapter.rank-pattern", ".*q=x"], "--adapter.rank-pattern '.*q=x': expected REGEX=NUMBER"),
        (["--adapter.kind", "ln", "--adapter.target", "ln_f.*", "--adapter.rs"], "of --adapter.kind lora and dora"),
    ],
)
def test_bad_options_are_one_line(options: list[str], says: str, project: Path, tmp_path: Path, capsys: Any):
    args = [*training_options(project), "--out", str(tmp_path), *options]
    assert main(["train", *args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error
    assert not list(tmp_path.glob("*/checkpoints"))


def test_recorded_recipes_name_what_they_train():
    """A default that changes changes no recorded recipe."""
    small: Any = find("lora-small")
    assert (small.adapter.rank, small.adapter.alpha, small.lr) == (8, 16, 3e-4)
    assert small.adapter.target == r"blocks\..*\.(q|k|v|o)"
