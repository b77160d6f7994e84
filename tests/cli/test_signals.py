"""Signals: a training that is told to end leaves a checkpoint."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.command_line import CommandProcess, training_options

import fgpt
import fgpt.cli.tasks.instruction_tuning
import fgpt.cli.training.build
import fgpt.cli.training.step_log
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics


def sleep_through(what: str) -> None:
    """As a library that swallows every exception."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            time.sleep(0.02)
        except BaseException:
            print(what, file=sys.stderr, flush=True)


def endless_batches() -> None:
    def batches(*_: Any) -> Iterator[Any]:
        sleep_through("swallowed")
        yield

    fgpt.cli.training.build.batches = batches


def endless_loading() -> None:
    def load(*_: Any) -> None:
        print("loading", file=sys.stderr, flush=True)
        sleep_through("swallowed")

    fgpt.cli.tasks.instruction_tuning.load_base = load


def slow_steps() -> None:
    def peak_memory(_: Any) -> float:
        time.sleep(0.05)
        return 1.0

    fgpt.cli.training.step_log.peak_memory = peak_memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "begun", "answer"),
    [(endless_batches, "steps", "ending after this step"), (endless_loading, "loading", "swallowed")],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_what_swallows_the_first(
    prepare: Callable[[], None], begun: str, answer: str, number: signal.Signals, project: Path, tmp_path: Path
):
    child = CommandProcess(["train", *training_options(project), "--out", str(tmp_path)], prepare)
    child.hear(begun)
    time.sleep(0.3)
    child.signal(number)
    child.hear(answer)
    assert os.waitpid(child.pid, os.WNOHANG) == (0, 0)
    child.signal(number)
    status, _, output = child.end()
    assert status == -number
    assert "Traceback" not in output


def test_a_hangup_ends_a_training_with_a_checkpoint(project: Path, tmp_path: Path):
    child = CommandProcess(["train", *training_options(project), "--steps", "4000", "--out", str(tmp_path)], slow_steps)
    child.hear("step 1/4000")
    child.signal(signal.SIGHUP)
    status, _, output = child.end()
    assert status == 130
    assert "Traceback" not in output
    assert "interrupted after" in output
    run = tmp_path / "lora-nano"
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert list((run / "checkpoints").glob("step-*/manifest.json"))
    assert (run / "adapter").is_dir()


def test_a_terminal_that_is_gone_ends_a_training_in_order(project: Path, tmp_path: Path):
    """With the hangup its stderr goes, so that nothing can be told any more."""
    child = CommandProcess(["train", *training_options(project), "--steps", "4000", "--out", str(tmp_path)], slow_steps)
    child.hear("step 1/4000")
    assert child.stderr is not None
    child.stderr.close()
    child.stderr = None
    child.signal(signal.SIGHUP)
    assert child.end()[0] == 130
    assert json.loads((tmp_path / "lora-nano" / "status.json").read_text())["state"] == "interrupted"


def test_a_hangup_that_is_ignored_stays_so(project: Path, tmp_path: Path):
    """As nohup has it."""

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        slow_steps()

    child = CommandProcess(
        ["train", *training_options(project), "--compare-prompts", "0", "--steps", "9", "--out", str(tmp_path)], prepare
    )
    child.hear("step 1/9")
    child.signal(signal.SIGHUP)
    assert child.end()[0] == 0
    assert len(read_metrics(tmp_path / "lora-nano" / "metrics.jsonl")) == 9


def test_signals_are_as_before_when_a_command_has_ended():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert main(["eval"]) == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
