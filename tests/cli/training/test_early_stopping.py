"""A training ends when its held-out loss no longer falls, after the same step however often it was interrupted."""

import contextlib
import json
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from builders.resume import assert_same_files, exit_status, final_files, resume, run_in, run_in_fork
from builders.tiny_training import STEPS, tiny_job
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from fgpt.cli import report
from fgpt.cli.listing import summarize_run
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.loop import TrainResult, train_loop
from fgpt.tree import leaves

LOSSES = st.lists(st.sampled_from([1.0, 2.0, 3.0, float("nan")]), min_size=STEPS, max_size=STEPS)


class KilledError(Exception):
    """In place of a signal."""


def bits(trainable: Any) -> bytes:
    return b"".join(x.numpy().tobytes() for x in leaves(trainable).values())


@cache
def step_by_state() -> dict[bytes, int]:
    """The number of each step, by the trained leaves after it."""
    job, found = tiny_job(), {}
    state = job.initial_state.take()
    for step, micro_batches in zip(range(1, STEPS + 1), job.batches(0)):
        state, _ = job.train_step(state, micro_batches)
        found[bits(state.trainable)] = step
    return found


def job_of(losses: list[float], patience: int, **options: Any) -> TrainingJob:
    """A training whose held-out loss after step N is the N-th of these."""
    recorded = {"heldout_loss": lambda trainable: losses[step_by_state()[bits(trainable)] - 1]}
    return tiny_job(eval_losses=recorded, early_stopping_patience=patience, **options)


def last_step(losses: list[float], patience: int, eval_every: int) -> int:
    """By the definition: the first evaluation before which `patience` ones, itself included, did not lower the loss."""
    least, bad = float("inf"), 0
    for step in range(eval_every, STEPS + 1, eval_every):
        improved = losses[step - 1] < least
        least, bad = (losses[step - 1], 0) if improved else (least, bad + 1)
        if bad == patience:
            return step
    return STEPS


def train_until(job: TrainingJob, out: Path, steps: int) -> None:
    """Train this many steps, and then end as a killed process does."""
    taken = 0

    def step(*args: Any) -> Any:
        nonlocal taken
        if taken == steps:
            raise KilledError
        taken += 1
        return job.step(*args)

    with contextlib.suppress(KilledError):
        train_loop(replace(job, step=step), out)


def untimed(out: Path) -> list[str]:
    timed = ("seconds", "memory_gb")
    lines = read_metrics(out / "metrics.jsonl")
    return [json.dumps({k: v for k, v in line.items() if k not in timed}) for line in lines]


@pytest.mark.slow
@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.generate])  # an example takes half a second
@example(losses=[1.0, *[2.0] * 7], patience=3, eval_every=1, kills=[3], minutes=99.0, keep_best=False)
@example(losses=[1.0, *[2.0] * 7], patience=3, eval_every=1, kills=[3, 2], minutes=0.0, keep_best=True)
@given(
    losses=LOSSES,
    patience=st.integers(1, 3),
    eval_every=st.integers(1, 3),
    kills=st.lists(st.integers(0, STEPS), max_size=3),
    minutes=st.sampled_from([0.0, 99.0]),
    keep_best=st.booleans(),
)
def test_it_ends_after_the_same_step_however_often_it_is_killed(
    losses: list[float], patience: int, eval_every: int, kills: list[int], minutes: float, keep_best: bool
):
    options = {"eval_every": eval_every, "checkpoint_every_minutes": minutes, "keep_best": keep_best}
    results: list[TrainResult] = []
    texts = []
    for its_kills in ([], kills):
        out = Path(tempfile.mkdtemp())
        for steps in its_kills:
            train_until(job_of(losses, patience, **options), out, steps)
        results.append(train_loop(job_of(losses, patience, **options), out))
        texts.append(untimed(out))
        shutil.rmtree(out)
    expected = last_step(losses, patience, eval_every)
    assert len(texts[0]) == expected
    assert texts[0] == texts[1]
    assert not results[0].interrupted
    assert not results[1].interrupted
    assert bits(results[0].state.trainable) == bits(results[1].state.trainable)
    if not keep_best:
        assert int(results[0].state.step) == expected


def test_a_training_that_had_ended_takes_no_step_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """KilledError after its last checkpoint, before anything was saved."""
    losses = [1.0, *[2.0] * (STEPS - 1)]
    first = train_loop(job_of(losses, 2, eval_every=1), tmp_path)
    capsys.readouterr()
    again = train_loop(job_of(losses, 2, eval_every=1), tmp_path)
    assert int(first.state.step) == int(again.state.step) == 3
    assert not again.interrupted
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    message = "stopped early, after step 3 of 8: in 2 evaluations the held-out loss has not fallen below 1.0000"
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_run_that_stopped_early_has_finished(training_args: Any, tmp_path: Path):
    """As status, list and report say; resumed after an interruption it ends with the same files."""
    args = [*training_args["instruct"], "--lr", "0.5", "--eval-every", "1", "--early-stopping-patience", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert exit_status(run_in_fork(["train", *args, "--out", str(whole)])) == 0
    (run,) = run_in(whole)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    steps = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert 3 <= steps < 12
    assert summarize_run(run)[2:4] == (steps, 12)
    assert summarize_run(run).state == "finished"
    page = report.run(str(run)).read_text()
    assert f"The training finished early, after step {steps} of 12" in page
    assert main(resume(run)) == 2  # there is nothing to resume

    shutil.copytree(whole, killed)
    (run,) = run_in(killed)
    (run / "status.json").write_text('{"state": "running", "steps": 12}\n')
    for folder in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    assert exit_status(run_in_fork(resume(run))) == 0
    assert_same_files(final_files(killed), final_files(whole))


@pytest.mark.parametrize("recipe", ["lora-nano", "emotion-small", "pretrain-nano"])
def test_it_needs_evaluations(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--early-stopping-patience", "3", "--eval-every", "None", "--out", str(tmp_path)]
    assert main(["train", recipe, *options]) == 2
    message = "--early-stopping-patience 3 counts evaluations: give --eval-every N as well"
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
