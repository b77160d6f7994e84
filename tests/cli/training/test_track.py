"""Where a run's figures go: event files read back by TensorBoard itself, wandb's and trackio's by what they wrote."""

import json
import os
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from fgpt import recipes
from fgpt.cli.training.trackers import check, tracking
from fgpt.errors import InputError

RUN = replace(recipes.find("lora-nano"), tracker=None)


def lines(first: int, last: int, loss: float) -> list[dict[str, float]]:
    return [{"step": i, "loss": loss + i, "lr": 0.5 / i, "tokens": 100 * i} for i in range(first, last + 1)]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(x.step, x.value) for x in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def installed(name: str) -> None:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")


# ------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_has_every_figure(tmp_path: Path):
    with tracking(RUN, tmp_path, 0) as track:
        for line in lines(1, 5, 2.0):
            track(line)
        assert len(events(tmp_path)["loss"]) == 5  # already, and not at the end alone
    found = events(tmp_path)
    assert found.keys() == {"loss", "lr", "tokens"}
    assert found["loss"] == [(i, 2.0 + i) for i in range(1, 6)]
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert re.fullmatch(r"events\.out\.tfevents\.\d{10}\.\d{6}", file.name)  # no host, and no number of a process
    assert socket.gethostname().encode() not in file.read_bytes()
    assert found["lr"] == [(i, pytest.approx(0.5 / i)) for i in range(1, 6)]


def test_a_resumed_run_forgets_the_steps_after_its_checkpoint(tmp_path: Path):
    for begin, last, loss in ((0, 6, 2.0), (3, 5, 7.0)):
        with tracking(RUN, tmp_path, begin) as track:
            for line in lines(begin + 1, last, loss):
                track(line)
    assert events(tmp_path)["loss"] == [(1, 3.0), (2, 4.0), (3, 5.0), (4, 11.0), (5, 12.0)]


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
    assert events(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def absent(asked: str) -> None:
        if asked == name:
            raise metadata.PackageNotFoundError(asked)

    monkeypatch.setattr("fgpt.cli.training.trackers.metadata.distribution", absent)
    run = RUN if name == "tensorboard" else replace(RUN, tracker=name)
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

    with tracking(RUN, tmp_path, 0) as track:
        first, *others = lines(1, 4, 2.0)
        track(first)
        monkeypatch.setattr(RecordWriter, "write", full)
        for line in others:
            track(line)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == len(calls) == 1
    assert said[0].startswith("TensorBoard failed: [Errno 28] No space left on device; training continues")


def test_a_tracker_that_cannot_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tensorboard").write_text("a file in its place")
    with tracking(RUN, tmp_path, 0) as track:
        track({"step": 1, "loss": 1.0})
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("TensorBoard cannot be used: ")


def test_what_goes_wrong_in_the_training_is_not_held_back(tmp_path: Path):
    def trained() -> None:
        with tracking(RUN, tmp_path, 0) as track:
            track({"step": 1, "loss": 1.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained()
    assert events(tmp_path)["loss"] == [(1, 1.0)]


# --------------------------------------------------------------------------------------------------- wandb and trackio


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A session of wandb's own: it looks at its settings once in each."""
    installed("wandb")
    import wandb  # pyright: ignore[reportMissingImports]

    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def records(file: Path) -> Iterator[bytes]:
    """Those of one of wandb's files, which is a log as LevelDB writes it behind a header of seven bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no record begins at the end of a block
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def kept_by_wandb(file: Path) -> tuple[str, dict[str, str], list[dict[str, float]]]:
    """The id, config and lines in one of wandb's offline files."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    name, config, history = "", {}, []
    for data in records(file):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            name, config = record.run.run_id, {x.key: x.value_json for x in record.run.config.update}
        if record.WhichOneof("record_type") == "history":
            items = {x.key or x.nested_key[0]: x.value_json for x in record.history.item}
            history.append({key: json.loads(x) for key, x in items.items() if not key.startswith("_")})
    return name, config, history


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, wandb: pytest.MonkeyPatch):
    wandb.setenv("WANDB_MODE", "offline")
    run = replace(RUN, tracker="wandb")
    for begin in (0, 3):
        with tracking(run, tmp_path, begin) as track:
            for line in lines(begin + 1, begin + 3, 2.0):
                track(line)
    name = json.loads((tmp_path / "track.json").read_text())["wandb"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    assert len(files) == 2
    for begin, file in zip((0, 3), files, strict=True):
        kept, config, history = kept_by_wandb(file)
        assert kept == name
        assert json.loads(config["lr"]) == RUN.lr
        assert json.loads(config["adapter"])["rank"] == 16
        assert [(x["step"], x["loss"]) for x in history] == [(i, 2.0 + i) for i in range(begin + 1, begin + 4)]
    assert len(events(tmp_path)["loss"]) == 6


def test_wandb_without_a_key_is_one_line(tmp_path: Path, wandb: pytest.MonkeyPatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        wandb.delenv(name, raising=False)
    wandb.setenv("HOME", str(tmp_path))
    wandb.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"WANDB_MODE=offline$"), tracking(replace(RUN, tracker="wandb"), tmp_path, 0):
        pass


def test_trackio_goes_on_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    installed("trackio")
    if "trackio" not in sys.modules:  # it looks once
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    run, folder = replace(RUN, tracker="trackio"), tmp_path / "lora-nano"
    folder.mkdir()
    for begin in (0, 3):
        with tracking(run, folder, begin) as track:
            for line in lines(begin + 1, begin + 3, 2.0):
                track(line)
    assert not capsys.readouterr().out
    name = f"lora-nano-{json.loads((folder / 'track.json').read_text())['trackio']}"
    with sqlite3.connect(tmp_path / "kept" / "fgpt.db") as kept:
        rows = kept.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(run, step, json.loads(x)["loss"]) for run, step, x in rows] == [(name, i, 2.0 + i) for i in range(1, 7)]
    assert len(events(folder)["loss"]) == 6


def test_no_file_is_left_by_a_run_without_a_tracker(tmp_path: Path):
    with tracking(RUN, tmp_path, 0):
        pass
    assert os.listdir(tmp_path) == ["tensorboard"]
