"""The cache folder: log-probabilities of a reference policy are the same bits from it, and what is unused goes."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import same, tiny, tokens

import fgpt
from fgpt.cli import cache
from fgpt.cli.training import reference_cache
from fgpt.cli.training.preference_batches import PreferenceExamples, reference_logprobs
from fgpt.cli.training.reference_cache import cached_reference
from fgpt.data.examples import Example

BASE = tiny(d_model=32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(reference_cache, "MIN_WORK", 0)
    return tmp_path / "reference"


def answers(seed: int = 0, count: int = 5) -> PreferenceExamples:
    def some(first: int) -> list[Example]:
        return [Example.completion(tuple(tokens(31, 4 + i % 3, seed=first + i).tolist()), 2) for i in range(count)]

    return PreferenceExamples(some(seed), some(seed + 100))


def test_the_cache_gives_the_same_bits(folder: Path, capsys: pytest.CaptureFixture[str]):
    computed = reference_logprobs(BASE, answers())
    for case in ("cold", "warm"):
        found = cached_reference(BASE, answers())
        assert same(found.chosen, computed.chosen)
        assert same(found.rejected, computed.rejected)
        assert ("from the cache" in capsys.readouterr().err) == (case == "warm")
    assert len(list(folder.iterdir())) == 1


def test_another_base_other_answers_and_threads_are_other_entries(folder: Path, monkeypatch: pytest.MonkeyPatch):
    cached_reference(BASE, answers())
    cached_reference(fgpt.adapt(BASE, {"wte.w": BASE.wte.w + 1e-6}), answers())
    cached_reference(replace(BASE, cfg=replace(BASE.cfg, norm_eps=1e-3)), answers())  # equal weights, another model
    cached_reference(BASE, answers(seed=1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    cached_reference(BASE, answers())
    assert len(list(folder.iterdir())) == 5


def test_little_work_is_not_cached(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference_cache, "MIN_WORK", 1e12)
    cached_reference(BASE, answers())
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["cut", "a bit"])
def test_a_damaged_entry_is_computed_again(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]):
    computed = cached_reference(BASE, answers())
    (file,) = folder.glob("*/*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-3] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    again = cached_reference(BASE, answers())
    assert same(again.chosen, computed.chosen)
    assert same(again.rejected, computed.rejected)
    assert "is damaged" in " ".join(capsys.readouterr().err.split())
    assert file.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    folder.write_text("a file")
    computed = reference_logprobs(BASE, answers())
    assert same(cached_reference(BASE, answers()).chosen, computed.chosen)
    assert "are not cached" in " ".join(capsys.readouterr().err.split())


def test_what_was_not_used_for_a_month_goes(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    """And nothing else: not what was used since, what another process holds, and what is not the cache's."""
    for seed in range(3):
        cached_reference(BASE, answers(seed))
    unused, used, held = sorted(folder.iterdir())
    (folder / "mine").mkdir()
    (folder / ("a" * 32)).mkdir()
    old = time.time() - 31 * 24 * 3600
    for path in folder.iterdir():
        os.utime(path, (old, old))
    cache.note_use(used)
    with cache.lock(held):
        os.utime(held, (old, old))
        cache.remove_unused("reference")
    assert sorted(path.name for path in folder.iterdir()) == sorted([used.name, held.name, "mine", "a" * 32])
    assert unused not in folder.iterdir()
    assert "deleted from the cache (reference), unused for 30 days: 1," in " ".join(capsys.readouterr().err.split())


def test_reading_is_a_use(folder: Path):
    cached_reference(BASE, answers())
    (entry,) = folder.iterdir()
    os.utime(entry, (0, 0))
    cached_reference(BASE, answers())
    assert time.time() - entry.stat().st_mtime < 100
