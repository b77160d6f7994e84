"""Steps that are launched before the metrics of the last one are read, as on a GPU: the same run."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.resume import assert_same_files, exit_status, final_files, run_in, run_in_fork
from builders.tiny_training import STEPS, tiny_job

import fgpt
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training import checkpoints, loop
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.loop import train_loop
from fgpt.cli.training.pending import PendingMetrics
from fgpt.errors import InputError

TIMED = ("seconds", "memory_gb")


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "AHEAD_DEVICES", {"cpu"})


def heldout_loss(adapters: Any) -> float:
    return float(sum(x.b.square().sum() for x in adapters.values()))


HELDOUT = {"eval_losses": {"heldout_loss": heldout_loss}, "eval_every": 3}


def lines(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize("options", [{}, HELDOUT, {"checkpoint_every_minutes": 0.0}])
def test_the_same_lines_and_state(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results = {}
    for name, devices in (("plain", set[str]()), ("ahead", {"cpu"})):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(loop, "AHEAD_DEVICES", devices)
        result = train_loop(tiny_job(**options), tmp_path / name)
        results[name] = fgpt.tree.leaves(result.state)
        assert [line["step"] for line in lines(tmp_path / name)] == [*range(1, STEPS + 1)]
    assert lines(tmp_path / "ahead") == lines(tmp_path / "plain")
    assert all(torch.equal(x, results["ahead"][path]) for path, x in results["plain"].items())


def test_a_step_is_launched_before_the_last_one_is_read(ahead: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[tuple[str, int]] = []
    read, train_step = PendingMetrics.read, TrainingJob.train_step

    def logged_read(self: PendingMetrics) -> Any:
        events.append(("read", self.step))
        return read(self)

    def logged_step(self: TrainingJob, state: Any, micro_batches: Any, step: Any) -> Any:
        events.append(("launch", step + 1))
        return train_step(self, state, micro_batches, step)

    monkeypatch.setattr(PendingMetrics, "read", logged_read)
    monkeypatch.setattr(TrainingJob, "train_step", logged_step)
    train_loop(tiny_job(), tmp_path)
    at = {event: i for i, event in enumerate(events)}
    for step in range(1, STEPS):
        read_first = at["read", step] < at["launch", step + 1]
        assert read_first == (step <= 2), f"step {step}"  # the first two are checked at once
        assert step + 2 > STEPS or at["read", step] < at["launch", step + 2]


@pytest.mark.parametrize("at", [1, 2, 5, STEPS])
def test_a_loss_that_is_not_finite_ends_it_at_its_step(at: int, ahead: None, tmp_path: Path):
    with pytest.raises(InputError, match=f"the loss became nan .* at step {at} with lr 0.001"):
        train_loop(tiny_job(nan_at=at), tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, at)]
    assert not (tmp_path / "checkpoints").exists()


def test_no_checkpoint_is_of_a_state_after_it(ahead: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One falls due after step 4, and one after step 6, which is launched before step 5 is read."""
    launched: list[int] = []
    saved: list[int] = []
    train_step = TrainingJob.train_step

    def logged_step(self: TrainingJob, state: Any, micro_batches: Any, step: Any) -> Any:
        launched.append(step + 1)
        return train_step(self, state, micro_batches, step)

    monkeypatch.setattr(TrainingJob, "train_step", logged_step)
    monkeypatch.setattr(checkpoints, "save", lambda out, state, *_: saved.append(int(state.step)))
    monkeypatch.setattr(checkpoints.Checkpointer, "is_due", lambda self, loss, last: launched[-1] in (4, 6))
    with pytest.raises(InputError, match="at step 5"):
        train_loop(tiny_job(nan_at=5), tmp_path)
    assert (saved, launched[-1]) == ([4], 6)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def work_ahead() -> None:
    loop.AHEAD_DEVICES = frozenset({"cpu"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timed", "pretrain"])
def test_killed_at_random_moments_it_comes_to_the_same(
    kind: str, training_args: Any, undisturbed_results: Any, tmp_path: Path
):
    args, (expected, seconds), chance = training_args[kind], undisturbed_results[kind], random.Random(1)
    for attempt in range(4):
        out = tmp_path / str(attempt)
        pid = run_in_fork(["train", *args, "--out", str(out)], work_ahead)
        time.sleep(chance.uniform(0.3 * seconds, 0.9 * seconds))
        os.kill(pid, signal.SIGKILL)
        if exit_status(pid) != 0:
            if not run_in(out):
                shutil.rmtree(out, ignore_errors=True)
            resume = ["train", args[0], "--resume"] if run_in(out) else ["train", *args]
            assert exit_status(run_in_fork([*resume, "--out", str(out)], work_ahead)) == 0
        assert_same_files(final_files(out, kind == "timed"), expected)
