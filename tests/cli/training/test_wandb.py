"""W&B and trackio go on with the same run."""

import importlib
import json
import os
import sqlite3
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from builders.trackers import TRACKED_RUN, metric_lines, tensorboard_events

from fgpt.cli.training.trackers import tracking
from fgpt.errors import InputError


def fake_package(name: str) -> None:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A session of wandb's own: it looks at its settings once in each."""
    fake_package("wandb")
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


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run(tmp_path: Path, wandb: pytest.MonkeyPatch):
    wandb.setenv("WANDB_MODE", "offline")
    run = replace(TRACKED_RUN, tracker="wandb")
    for begin in (0, 3):
        with tracking(run, tmp_path, begin) as track:
            for line in metric_lines(begin + 1, begin + 3, 2.0):
                track(line)
    importlib.import_module("wandb").teardown()  # its own process writes the files, and has ended then
    name = json.loads((tmp_path / "track.json").read_text())["wandb"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))  # by the time in the names of their folders
    assert len(files) == 2
    for begin, file in zip((0, 3), files, strict=True):
        database, config, history = kept_by_wandb(file)
        assert database == name
        assert json.loads(config["lr"]) == TRACKED_RUN.lr
        assert json.loads(config["adapter"])["rank"] == 16
        assert [(x["step"], x["train/loss"]) for x in history] == [(i, 2.0 + i) for i in range(begin + 1, begin + 4)]
    assert len(tensorboard_events(tmp_path)["train/loss"]) == 6


def test_wandb_without_a_key_is_one_line(tmp_path: Path, wandb: pytest.MonkeyPatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        wandb.delenv(name, raising=False)
    wandb.setenv("HOME", str(tmp_path))
    wandb.setenv("NETRC", str(tmp_path / "none"))
    with (
        pytest.raises(InputError, match=r"WANDB_MODE=offline$"),
        tracking(replace(TRACKED_RUN, tracker="wandb"), tmp_path, 0),
    ):
        pass


def test_trackio_goes_on_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake_package("trackio")
    if "trackio" not in sys.modules:  # it looks once
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    run, folder = replace(TRACKED_RUN, tracker="trackio"), tmp_path / "lora-nano"
    folder.mkdir()
    for begin in (0, 3):
        with tracking(run, folder, begin) as track:
            for line in metric_lines(begin + 1, begin + 3, 2.0):
                track(line)
    assert not capsys.readouterr().out
    name = f"lora-nano-{json.loads((folder / 'track.json').read_text())['trackio']}"
    with sqlite3.connect(tmp_path / "kept" / "fgpt.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(run, step, json.loads(x)["train/loss"]) for run, step, x in rows] == [
        (name, i, 2.0 + i) for i in range(1, 7)
    ]
    assert len(tensorboard_events(folder)["train/loss"]) == 6


def test_no_file_is_left_by_a_run_without_a_tracker(tmp_path: Path):
    with tracking(TRACKED_RUN, tmp_path, 0):
        pass
    assert os.listdir(tmp_path) == ["tensorboard"]
