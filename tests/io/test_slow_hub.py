"""A hub that stands still is not waited for; a slow line is."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import same
from builders.hub import NUMBERED, PARAMS, FakeHub, fake_dataset, fake_model
from huggingface_hub import constants

import fgpt
from fgpt.data import hub_files, instruction_datasets
from fgpt.io import models

SLOW: dict[str, Callable[[str, str], tuple[int, float] | None]] = {
    "is silent": lambda method, path: (1, 99.0),
    "is silent about its files": lambda method, path: (1, 99.0) if "/tree/" in path else None,
    "is silent about one file": lambda method, path: (1, 99.0) if method == "HEAD" else None,
    "sends no weights": lambda method, path: (300, 0.1) if path.endswith("safetensors") and method == "GET" else None,
    "sends a byte at a time": lambda method, path: (1, 0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SLOW)
def test_a_hub_that_stands_still_is_not_waited_for(
    what: str, tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
):
    fake.files, fake.slow = fake_model(tmp_path / "model"), SLOW[what]
    monkeypatch.setattr(hub_files, "RESPONSE_SECONDS", 0.5)
    monkeypatch.setattr(hub_files, "STALL_SECONDS", 1.0)
    begin = time.perf_counter()
    with pytest.raises(fgpt.InputError, match="the hub cannot be reached") as caught:
        fgpt.load("me/it")
    assert time.perf_counter() - begin < 8  # of which a second or two are the process'
    reason = "ReadTimeout" if what == "is silent" else "fewer than 30,000 bytes in 1 seconds"
    assert f"({reason})" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_dataset_that_stands_still_is_not_waited_for(fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    fake.files, fake.slow = fake_dataset(monkeypatch, NUMBERED, "data/train-*.jsonl"), SLOW["sends a byte at a time"]
    monkeypatch.setattr(hub_files, "STALL_SECONDS", 1.0)
    with pytest.raises(
        fgpt.InputError, match=r"the hub gave no 'made' \(Stalled: fewer than 30,000 bytes in 1 seconds\)"
    ):
        instruction_datasets.load_rows("made")


@pytest.mark.slow
def test_a_slow_line_is_waited_for(tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    """A download that takes longer than the silence that is borne, at three times the least rate."""
    monkeypatch.setattr(hub_files, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(hub_files, "MIN_BYTES", 20_000)
    fake.files = fake_model(tmp_path / "model")
    assert len(fake.files["model.safetensors"]) > 200_000
    fake.slow = lambda method, path: (6_000, 0.1) if path.endswith("safetensors") and method == "GET" else None
    begin = time.perf_counter()
    assert same(fgpt.load("me/it"), PARAMS)
    assert time.perf_counter() - begin > 3


@pytest.mark.slow
def test_a_user_may_wait_longer(tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    """By the library's own variable."""
    monkeypatch.setattr(hub_files, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 3)
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "3")
    fake.files, fake.slow = fake_model(tmp_path / "model"), SLOW["sends no weights"]
    with pytest.raises(fgpt.InputError, match="in 3 seconds"):
        fgpt.load("me/it")
    assert models._missing_files(None) == ["config.json", "model.safetensors"]
