"""Tokens from the cache are the tokens that are made: cold or warm, without a cache, by one process or by several."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from builders.resume import assert_same_files, final_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fgpt.cli.main import main
from fgpt.cli.training import token_cache, tokenized_sources
from fgpt.cli.training.examples import InstructionData, load_heldout_rows, load_instruction_data
from fgpt.cli.training.hashes import fast_hash
from fgpt.cli.training.tokenized_sources import CHUNK_ROWS
from fgpt.data.tokenization_pool import Worker
from fgpt.errors import InputError
from fgpt.recipes import InstructionRecipe, find

Setup = Callable[..., None]
WORDS = ["the cat", "", " ", "  x\n", "\ud83d", "é", "🙂", "Say it.", "a b c d e f", "<|endoftext|>"]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache for sources of any size."""
    monkeypatch.setenv("FGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenized_sources, "MIN_BYTES", 0)
    return tmp_path / "cache" / "tokens"


def recipe_of(*paths: Path, **changes: object) -> InstructionRecipe:
    recipe = cast(InstructionRecipe, find("lora-nano"))
    return replace(recipe, data=tuple(map(str, paths)), **{"num_heldout": 3, "overlong": "drop"} | changes)


def talk(*texts: str) -> dict[str, Any]:
    """The user and the assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def write_rows(path: Path, count: int = 40) -> Path:
    rows = [talk(f"{WORDS[i % 7]} {i}\n\n{WORDS[i % 9]}", f"Yes {i}") for i in range(count)]
    long = talk("user 1", "assistant 1", "user 2", "assistant 2")
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, long, rows[3], long, long]))
    return path


def everything(data: InstructionData) -> tuple[object, ...]:
    return fast_hash(data.examples), list(data.examples), data.heldout, data.sources


def test_cold_warm_uncached_and_other_processes(
    tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(tokenized_sources, "CHUNK_ROWS", 7)
    recipe = recipe_of(write_rows(tmp_path / "a.jsonl"))
    results = {}
    for case, processes, size in [("uncached", 1, 1 << 40), ("cold", 1, 0), ("warm", 1, 0), ("three", 3, 0)]:
        if case == "three":
            monkeypatch.setenv("FGPT_CACHE", str(tmp_path / "other"))
        monkeypatch.setattr(tokenized_sources, "num_cores", lambda processes=processes: processes)
        monkeypatch.setattr(tokenized_sources, "MIN_BYTES", size)
        results[case] = everything(load_instruction_data(recipe))
        assert load_heldout_rows(recipe) == results[case][2]
        lines = " ".join(capsys.readouterr().err.split())
        assert ("tokens from the cache" in lines) == (case == "warm")
        assert ("tokenized 44 rows" in lines) == (case in ("cold", "three"))
    assert all(result == results["uncached"] for result in results.values())
    assert len(list(cached.glob("*/data"))) == 1
    assert not list(cached.glob("*/.*"))


@pytest.mark.slow
def test_a_training_is_the_same_with_and_without_a_cache(tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_rows(tmp_path / "a.jsonl")
    found = []
    for name, size in [("uncached", 1 << 40), ("cold", 0), ("warm", 0)]:
        monkeypatch.setattr(tokenized_sources, "MIN_BYTES", size)
        options = ["--data", str(path), "--num-heldout", "3", "--steps", "3", "--compare-prompts", "0"]
        options += ["--eval-every", "1"]
        assert main(["train", "lora-nano", *options, "--name", "run", "--out", str(tmp_path / name)]) == 0
        found.append(final_files(tmp_path / name))
    assert_same_files(found[1], found[0])
    assert_same_files(found[2], found[0])


@pytest.mark.slow
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(*[st.sampled_from(WORDS)] * 2, st.text(max_size=8)), min_size=8, max_size=20),
    overlong=st.sampled_from(["drop", "cut"]),
    template=st.sampled_from(["plain", "alpaca", "tulu"]),
    width=st.sampled_from([24, 64, 512]),
)
def test_a_cache_changes_nothing(
    tmp_path: Path, cached: Path, rows: list[tuple[str, str, str]], overlong: str, template: str, width: int
):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]))
    recipe = recipe_of(path, path, overlong=overlong, template=template, max_seq_len=width)
    found = []
    for size in (1 << 40, 0, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenized_sources, "MIN_BYTES", size)
            try:
                found.append(everything(load_instruction_data(recipe)))
            except InputError as err:
                found.append((str(err),))
    assert found[0] == found[1] == found[2]


def test_what_changes_the_tokens_changes_the_key(tmp_path: Path, cached: Path):
    path = write_rows(tmp_path / "a.jsonl")
    load_instruction_data(recipe_of(path))
    load_instruction_data(recipe_of(path, max_seq_len=100, seed=5, num_heldout=4))  # changes what is made of them
    assert len(list(cached.iterdir())) == 1
    load_instruction_data(recipe_of(path, template="tulu"))
    assert len(list(cached.iterdir())) == 2
    path.write_text(path.read_text().replace("Yes 5", "Yes 6"))
    (with_other_text,) = {load_instruction_data(recipe_of(path)).sources}
    assert len(list(cached.iterdir())) == 3
    assert with_other_text[0].name == str(path)


@pytest.mark.parametrize("harm", ["byte", "half", "missing", "summary", "foreign", "counts"])
def test_a_damaged_cache_is_made_again(harm: str, tmp_path: Path, cached: Path, capsys: pytest.CaptureFixture[str]):
    recipe = recipe_of(write_rows(tmp_path / "a.jsonl"))
    before = everything(load_instruction_data(recipe))
    (data,) = cached.glob("*/data")
    file = data / token_cache.EXAMPLES
    content = file.read_bytes()
    if harm == "byte":
        file.write_bytes(content[:999] + bytes([content[999] ^ 1]) + content[1000:])
    elif harm == "half":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "missing":
        file.unlink()
    elif harm == "counts":
        summary = json.loads((data / token_cache.SUMMARY).read_text())
        (data / token_cache.SUMMARY).write_text(json.dumps(summary | {"counts": [["raw texts", "x"]]}))
    elif harm == "summary":
        (data / token_cache.SUMMARY).write_text('{"key": ')
    else:
        summary = json.loads((data / token_cache.SUMMARY).read_text())
        (data / token_cache.SUMMARY).write_text(json.dumps(summary | {"key": "another"}))
    for expected in ("are damaged", "from the cache"):
        capsys.readouterr()
        assert everything(load_instruction_data(recipe)) == before
        assert expected in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_costs_the_cache_alone(
    tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recipe = recipe_of(write_rows(tmp_path / "a.jsonl"))
    before = everything(load_instruction_data(replace(recipe)))
    monkeypatch.setenv("FGPT_CACHE", str(tmp_path / "full"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_cache, "write_json", full)
    capsys.readouterr()
    assert everything(load_instruction_data(recipe)) == before
    output = " ".join(capsys.readouterr().err.split())
    assert "tokens are not cached, but kept in memory: cannot write" in output
    assert "No space left on device" in output
    monkeypatch.setenv("FGPT_CACHE", str(tmp_path / "a.jsonl"))  # a file, where no folder can be
    assert everything(load_instruction_data(recipe)) == before


def test_a_bad_row_is_an_error_and_leaves_nothing(tmp_path: Path, cached: Path):
    path = write_rows(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + '{"messages": [{"role": "usr", "content": "a"}]}\n')
    with pytest.raises(InputError, match="line 45, message 1: unknown role 'usr'"):
        load_instruction_data(recipe_of(path))
    assert not list(cached.glob("*/data"))
    assert not list(cached.glob("*/.*"))


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path, cached: Path):
    path = write_rows(tmp_path / "a.jsonl", CHUNK_ROWS + 100)
    code = (
        "import sys; from fgpt.cli.training import tokenized_sources; tokenized_sources.MIN_BYTES = 0;"
        "from fgpt.cli.training.examples import load_instruction_data; from dataclasses import replace;"
        "from fgpt.cli.training.hashes import fast_hash; from fgpt.recipes import find;"
        f"recipe = replace(find('lora-nano'), data=({str(path)!r},), num_heldout=3, overlong='drop');"
        "print(fast_hash(load_instruction_data(recipe).examples))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    hashes = {process.communicate(timeout=120)[0].strip() for process in both}
    assert hashes == {fast_hash(load_instruction_data(recipe_of(path)).examples)}
    assert len(list(cached.glob("*/data"))) == 1


def test_a_process_that_ends_is_reported(tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch):
    start = Worker.__init__

    def kill(self: Worker, *args: object) -> None:
        start(self, *args)  # pyright: ignore[reportArgumentType]
        self._process.kill()

    monkeypatch.setattr(Worker, "__init__", kill)
    monkeypatch.setattr(tokenized_sources, "num_cores", lambda: 2)
    with pytest.raises(InputError, match="a process that tokenizes ended at row 1, and no result came"):
        load_instruction_data(recipe_of(write_rows(tmp_path / "a.jsonl")))


def test_raw_texts_are_tokenized_once_for_every_length(
    tmp_path: Path, cached: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{WORDS[i % 7]} one two three {i}. " * 9}) + "\n" for i in range(20)))
    for width, expected in ((24, "tokenized 20 rows"), (64, "tokens from the cache"), (512, "tokens from the cache")):
        found = load_instruction_data(recipe_of(path, max_seq_len=width, template="none")).examples
        assert expected in " ".join(capsys.readouterr().err.split())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenized_sources, "MIN_BYTES", 1 << 40)
            alone = load_instruction_data(recipe_of(path, max_seq_len=width, template="none")).examples
        capsys.readouterr()
        assert list(found) == list(alone)
        assert int(found.lengths.max()) <= width
