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

KILLS = 50


def is_finished(out: Path) -> bool:
    return any(json.loads((run / "status.json").read_text())["state"] == "finished" for run in run_in(out))


def resume_command(args: list[str], out: Path) -> list[str]:
    if not run_in(out):  # it had not come so far as to be a run
        shutil.rmtree(out, ignore_errors=True)
        return ["train", *args, "--out", str(out)]
    return ["train", args[0], "--resume", "--out", str(out)]


@pytest.mark.slow
def test_killed_at_random_moments(training_args: Any, undisturbed_results: Any, tmp_path: Path):
    """50 kills, and in the end the same, without one run lost."""
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "often", [["--eval-every", "2"], ["--eval-every", "1", "--checkpoint-every-minutes", "99"]], ids=["each", "best"]
)
def test_killed_at_every_moment_of_writing(often: list[str], training_args: Any, tmp_path: Path):
    """Before each rename, flush and deletion, wherever it stands in a training of four steps, whose last deletes a
    checkpoint: with a checkpoint after each, and with those alone whose held-out loss is the best so far.
    """
    short = [*training_args["instruct"], "--steps", "4", "--keep-checkpoints", "1", "--compare-prompts", "0", *often]
    assert exit_status(run_in_fork(["train", *short, "--out", str(tmp_path / "whole")])) == 0
    expected, at = final_files(tmp_path / "whole"), 0

    def kill_at(number: int) -> None:
        left = number

        def count_and_call(call: Callable[..., Any]) -> Callable[..., Any]:
            def instead(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*args, **kwargs)

            return instead

        for name in CALLS:
            setattr(os, name, count_and_call(getattr(os, name)))

    while True:
        out = tmp_path / str(at)
        status = exit_status(run_in_fork(["train", *short, "--out", str(out)], lambda at=at: kill_at(at)))
        if status == 0:
            break  # it writes less often than that
        assert status == -signal.SIGKILL
        assert is_finished(out) or exit_status(run_in_fork(resume_command(short, out))) == 0
        assert_same_files(final_files(out), expected)
        at += 1
    assert at > 30
