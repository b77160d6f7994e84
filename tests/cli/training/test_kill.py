"""A training that is killed at any moment goes on to the same numbers."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.resume import assert_same_files, exit_status, final_files, run_in, run_in_fork

KILLS = 20


def is_finished(out: Path) -> bool:
    return any(json.loads((run / "status.json").read_text())["state"] == "finished" for run in run_in(out))


def resume_command(args: list[str], out: Path) -> list[str]:
    if not run_in(out):  # it had not come so far as to be a run
        shutil.rmtree(out, ignore_errors=True)
        return ["train", *args, "--out", str(out)]
    return ["train", args[0], "--resume", "--out", str(out)]


@pytest.mark.slow
def test_killed_at_random_moments(training_args: Any, undisturbed_results: Any, tmp_path: Path):
    """20 kills, and in the end the same, without one run lost."""
    chance, kills, ends = random.Random(0), 0, 0
    while kills < KILLS:
        kind = ("timed", "instruct", "classify", "timed", "pretrain")[ends % 5]
        args, (expected, seconds), out = training_args[kind], undisturbed_results[kind], tmp_path / str(ends)
        while True:
            pid = run_in_fork(resume_command(args, out))
            time.sleep(chance.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            if (status := exit_status(pid)) == 0 or is_finished(out):
                break  # or killed on its way out, when all was done
            assert status == -signal.SIGKILL, f"{kind} ended with {status} after {kills} kills"
            kills += 1
        assert_same_files(final_files(out, kind == "timed"), expected)
        ends += 1


CALLS = ("replace", "rename", "fsync", "unlink", "rmdir")


def disk(folder: Path) -> dict[str, bytes | None]:
    """All that lies in a folder: what a process that is killed now leaves behind."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def copy_each_state(out: Path, states: Path) -> None:
    """Copy `out` to a folder of `states` before each rename, flush and deletion, if it has changed since the last."""
    last: dict[str, bytes | None] = {}

    def copying(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            if out.exists() and last != (now := disk(out)):
                shutil.copytree(out, states / f"{len(list(states.iterdir())):03d}")
                last = now
            return call(*args, **kwargs)

        return instead

    for name in CALLS:
        setattr(os, name, copying(getattr(os, name)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "often", [["--eval-every", "2"], ["--eval-every", "1", "--checkpoint-every-minutes", "99"]], ids=["each", "best"]
)
def test_killed_at_every_moment_of_writing(often: list[str], training_args: Any, tmp_path: Path):
    """Before each rename, flush and deletion, wherever it stands in a training of three steps, whose last deletes a
    checkpoint: with a checkpoint after each, and with those alone whose held-out loss is the best so far.

    One training is enough: at each of these moments what lies on the disk is copied, as a kill would leave it.
    """
    short = [*training_args["instruct"], "--steps", "3", "--keep-checkpoints", "1", "--compare-prompts", "0", *often]
    whole, states = tmp_path / "whole", tmp_path / "states"
    states.mkdir()
    assert exit_status(run_in_fork(["train", *short, "--out", str(whole)], lambda: copy_each_state(whole, states))) == 0
    expected = final_files(whole)
    copies = sorted(states.iterdir())
    assert len(copies) > 25
    for out in copies:
        assert is_finished(out) or exit_status(run_in_fork(resume_command(short, out))) == 0
        assert_same_files(final_files(out), expected)
