"""Where a run's figures go: event files read back; a tracker that fails stops nothing."""

import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import pytest
from builders.trackers import TRACKED_RUN, metric_lines, tensorboard_events
from tensorboard.summary.writer.record_writer import RecordWriter

from fgpt.cli.training.trackers import check, tracking
from fgpt.errors import InputError

# ------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_has_every_figure(tmp_path: Path):
    with tracking(TRACKED_RUN, tmp_path, 0) as track:
        for line in metric_lines(1, 5, 2.0):
            track(line)
        assert len(tensorboard_events(tmp_path)["train/loss"]) == 5  # already, and not at the end alone
    found = tensorboard_events(tmp_path)
    assert found.keys() == {"train/loss", "train/learning_rate", "train/tokens"}
    assert found["train/loss"] == [(i, 2.0 + i) for i in range(1, 6)]
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert re.fullmatch(r"events\.out\.tfevents\.\d{10}\.\d{6}", file.name)  # no host, and no number of a process
    assert socket.gethostname().encode() not in file.read_bytes()
    assert found["train/learning_rate"] == [(i, pytest.approx(0.5 / i)) for i in range(1, 6)]


def test_a_resumed_run_forgets_the_steps_after_its_checkpoint(tmp_path: Path):
    for begin, last, loss in ((0, 6, 2.0), (3, 5, 7.0)):
        with tracking(TRACKED_RUN, tmp_path, begin) as track:
            for line in metric_lines(begin + 1, last, loss):
                track(line)
    assert tensorboard_events(tmp_path)["train/loss"] == [(1, 3.0), (2, 4.0), (3, 5.0), (4, 11.0), (5, 12.0)]


KILLED = """
import os, signal, sys
from pathlib import Path
from fgpt import recipes
from fgpt.cli.training.trackers import tracking

with tracking(recipes.find("lora-nano"), Path(sys.argv[1]), 0) as track:
    for i in range(1, 4):
        track({"step": i, "loss": 1.0 * i})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_takes_no_step(tmp_path: Path):
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert tensorboard_events(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def absent(package: str) -> None:
        if package == name:
            raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr("fgpt.cli.training.trackers.metadata.distribution", absent)
    run = TRACKED_RUN if name == "tensorboard" else replace(TRACKED_RUN, tracker=name)
    with pytest.raises(InputError, match=rf"^{name} is not installed.*: \S+ -m pip install {name}$") as err:
        check(run)
    assert "\n" not in str(err.value)
    with pytest.raises(InputError), tracking(run, tmp_path, 0):
        pass
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_fails_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls = []

    def full(*_: object) -> NoReturn:
        calls.append(1)
        raise OSError(28, "No space left on device")

    with tracking(TRACKED_RUN, tmp_path, 0) as track:
        first, *others = metric_lines(1, 4, 2.0)
        track(first)
        monkeypatch.setattr(RecordWriter, "write", full)
        for line in others:
            track(line)
    output = capsys.readouterr().err.strip().splitlines()
    assert len(output) == len(calls) == 1
    assert output[0].startswith("TensorBoard failed: [Errno 28] No space left on device; training continues")


def test_a_tracker_that_cannot_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tensorboard").write_text("a file in its place")
    with tracking(TRACKED_RUN, tmp_path, 0) as track:
        track({"step": 1, "loss": 1.0})
    output = capsys.readouterr().err.strip().splitlines()
    assert len(output) == 1
    assert output[0].startswith("TensorBoard cannot be used: ")


def test_what_goes_wrong_in_the_training_is_not_held_back(tmp_path: Path):
    def train() -> None:
        with tracking(TRACKED_RUN, tmp_path, 0) as track:
            track({"step": 1, "loss": 1.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert tensorboard_events(tmp_path)["train/loss"] == [(1, 1.0)]
