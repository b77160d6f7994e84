"""Datasets of the hub: whole, in part, and of which the cache holds a part."""

from pathlib import Path

import pytest
from builders.hub import NUMBERED, FakeHub, cache_of, fake_dataset, hub_is_away

import fgpt
from fgpt.data import instruction_datasets

HASHED = [f"data/train-{i:05}-of-00002-{h}.jsonl" for i, h in enumerate(("a1b2", "c3d4"))]


@pytest.mark.parametrize("names", [NUMBERED, HASHED], ids=["numbered", "hashed"])
def test_a_dataset_of_which_the_cache_holds_a_part(
    names: list[str], tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
):
    fake.files = fake_dataset(monkeypatch, [*names, "README.md"], "data/train-*.jsonl")
    cache_of(tmp_path, {names[1]: fake.files[names[1]]}, "datasets")
    there = monkeypatch.context()
    with there as patch:
        hub_is_away(patch)
        with pytest.raises(fgpt.InputError, match=rf"gave no 'made' beyond the part .* 1 of {len(names)} files"):
            instruction_datasets.load_rows("made")
    assert [row.instruction for row in instruction_datasets.load_rows("made")] == names
    fake.asked.clear()
    assert [row.instruction for row in instruction_datasets.load_rows("made")] == names
    assert not fake.asked


def test_a_dataset_of_which_a_part_is_wanted(tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    fake.files = fake_dataset(monkeypatch, NUMBERED, "data/train-00000-of-*.jsonl")
    cache_of(tmp_path, {NUMBERED[0]: fake.files[NUMBERED[0]]}, "datasets")
    assert len(instruction_datasets.load_rows("made")) == 1
    assert not fake.asked
