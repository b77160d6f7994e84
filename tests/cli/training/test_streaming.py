"""Streamed data trains as the same rows of a file do, resumes to the bit, and is read no further than needed."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from builders.hub import FakeHub
from builders.runs import copy_interrupted
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fgpt.cli.main import main
from fgpt.cli.training import streaming
from fgpt.cli.training.examples import encoding_of, load_heldout_rows, load_instruction_data
from fgpt.cli.training.row_order import RowOrder
from fgpt.cli.training.streaming import StreamOrder
from fgpt.data.examples import Example
from fgpt.data.instruction_datasets import RowStream
from fgpt.errors import InputError
from fgpt.recipes import InstructionRecipe
from fgpt.recipes.instruction import lora_nano

COMMAND = ["train", "lora-nano", "--streaming", "--compare-prompts", "0", "--micro-batch-size", "1"]


def rows(number: int) -> list[dict[str, str]]:
    """The answer of row i has i % 7 words of its own, none if that is 0."""
    return [{"instruction": f"Say {i}.", "output": " ".join([f"word {i}"] * (i % 7))} for i in range(number)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(50)))
    return tmp_path / "a.jsonl"


def recipe_of(file: Path, **changes: Any) -> InstructionRecipe:
    options: dict[str, Any] = {"max_seq_len": 64, "overlong": "drop", "steps": 9, "num_heldout": 3}
    options |= {"micro_batch_size": 2, "streaming": True, "shuffle_buffer_size": 20}
    return replace(lora_nano(), data=(str(file),), **options | changes)


def stream_of(recipe: InstructionRecipe) -> StreamOrder:
    return StreamOrder(recipe, encoding_of(recipe), None)


def tokens(updates: Iterator[list[list[Example]]], number: int) -> list[list[list[tuple[int, ...]]]]:
    taken = itertools.islice(updates, number)
    return [[[tuple(example.tokens) for example in row] for row in update] for update in taken]


def test_a_block_is_an_epoch_of_its_rows(file: Path):
    """Pass after pass: rows 3 to 22, 23 to 42, 43 to 49, and again."""
    recipe = recipe_of(file)
    expected: list[Any] = []
    for number, (start, stop) in enumerate([(3, 23), (23, 43), (43, 50)] * 2):
        of_block = replace(recipe, streaming=False, num_heldout=0, data=(f"{file}[{start}:{stop}]",))
        examples = load_instruction_data(of_block).examples
        order = RowOrder(examples, recipe, 64)
        expected += tokens(map(order.read, order.lay_out(number)), 100)
    stream = stream_of(recipe)
    assert tokens(stream.updates(), len(expected)) == expected
    assert [row.instruction for row in stream.heldout] == ["Say 0.", "Say 1.", "Say 2."]
    assert [row.instruction for row in load_heldout_rows(recipe)] == ["Say 0.", "Say 1.", "Say 2."]


@settings(max_examples=8)
@given(begin=st.integers(0, 40), size=st.integers(1, 60))
def test_updates_from_anywhere_are_those_of_the_whole(begin: int, size: int, tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("data") / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(30)))
    recipe = recipe_of(file, shuffle_buffer_size=size)
    assert tokens(stream_of(recipe).updates(begin), 3) == tokens(stream_of(recipe).updates(), begin + 3)[begin:]


def test_no_more_is_read_than_a_block(file: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []

    class Counted(RowStream):
        def __iter__(self) -> Iterator[Any]:
            for row in super().__iter__():
                read.append(row.instruction)
                yield row

    monkeypatch.setattr(streaming, "RowStream", Counted)
    updates = stream_of(recipe_of(file, shuffle_buffer_size=10)).updates()
    assert len(read) == 13
    next(updates)
    assert len(read) == 13


@pytest.mark.slow
def test_what_is_left_out_is_printed(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--data", str(file), "--steps", "40", "--shuffle-buffer-size", "10", "--num-heldout", "1"]
    options += ["--max-seq-len", "32", "--overlong", "drop", "--out", str(tmp_path)]
    assert main([*COMMAND, *options]) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "a.jsonl: instructions (columns instruction, output), 11 rows so far, streamed" in output
    report = output[output.index("streamed ", output.index("saved")) :]
    count = int(report.split()[1])
    passes = -(-count // 49)
    assert count > 49
    assert f"streamed {count} rows of {file}, in {passes} passes" in report
    train = list(itertools.islice(itertools.cycle(rows(50)[1:]), count))
    empty = sum(not row["output"] for row in train)
    assert f"and {empty} without a response" in report


def test_what_readers_leave_out_is_printed_within_a_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Three texts in four are empty, and the training ends long before the last row."""
    texts = [f"A tale of {i}." if i % 4 == 3 else " " for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--data", str(tmp_path / "a.jsonl"), "--steps", "1", "--overlong", "drop", "--num-heldout", "2"]
    assert main([*COMMAND, *options, "--shuffle-buffer-size", "10", "--out", str(tmp_path)]) == 0
    report = " ".join(capsys.readouterr().err.partition("saved in")[2].split())
    assert "streamed 10 rows" in report
    assert "36 empty texts" in report


@pytest.mark.slow
def test_resumed_to_the_bit(file: Path, tmp_path: Path):
    options = ["--data", str(file), "--steps", "8", "--overlong", "cut", "--num-heldout", "2", "--max-seq-len", "48"]
    options += ["--shuffle-buffer-size", "7", "--adapter.dropout", "0.1"]
    options += ["--checkpoint-every-minutes", "0", "--keep-checkpoints", "9"]
    assert main([*COMMAND, *options, "--out", str(tmp_path)]) == 0
    whole, resumed = tmp_path / "lora-nano", tmp_path / "resumed" / "lora-nano"
    copy_interrupted(whole, resumed, after=5)
    assert main(["train", str(resumed), "--resume", "--out", str(resumed.parent)]) == 0
    name = "adapter/adapter_model.safetensors"
    expected, got = (load_file(folder / name) for folder in (whole, resumed))
    assert expected.keys() == got.keys()
    for path, x in expected.items():
        assert torch.equal(x, got[path]), path


def lines(name: str, number: int) -> bytes:
    return b"".join(json.dumps({"instruction": f"{name} {i}", "output": "x y"}).encode() + b"\n" for i in range(number))


def test_a_dataset_of_the_hub_is_never_on_disk(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    endpoint = f"http://127.0.0.1:{fake.server.server_port}"
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}")
    fake.files = {f"data/train-{i}-of-2.jsonl": lines(f"part {i}", 30) for i in range(2)}
    fake.files["data/test-0-of-1.jsonl"] = lines("test", 5)
    stream = RowStream("me/it", streaming=True)
    assert [row.instruction for row in stream] == [f"part {part} {i}" for part in range(2) for i in range(30)]
    assert stream.format == "me/it: instructions (columns instruction, output), 60 rows"
    assert len(list(RowStream("me/it[test[1:3]]", streaming=True))) == 2
    assert not list((tmp_path / "cache").rglob("*.jsonl"))
    with pytest.raises(InputError, match=r"me/it\[nothing\[:3\]\] cannot be streamed .*train.*test"):
        RowStream("me/it[nothing[:3]]", streaming=True)
    with pytest.raises(InputError, match="bounds from its beginning"):
        RowStream("me/it[train[-3:]]", streaming=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--steps in place of epochs"),
        (["--steps", "2"], "--overlong drop or cut"),
        (["--steps", "2", "--overlong", "drop", "--num-heldout", "0.1"], "holds out the first rows"),
        (["--steps", "2", "--overlong", "drop", "--num-heldout", "50"], "takes them all"),
        (["--steps", "2", "--overlong", "drop", "--num-heldout", "4", "--max-seq-len", "4"], "of the first 46 rows of"),
        (["--steps", "2", "--overlong", "drop", "--data", "nano"], "the embedded data is not"),
        (["--steps", "2", "--overlong", "drop", "--data", "a.jsonl", "b.jsonl"], "one source"),
        (["--steps", "2", "--overlong", "drop", "--data", "a.jsonl:0.5"], "no weight"),
        (["--steps", "2", "--overlong", "drop", "--data", "a.jsonll"], "no such file"),
    ],
)
def test_what_a_stream_cannot_do(
    options: list[str], says: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(file.parent)
    data = [] if "--data" in options else ["--data", "a.jsonl"]
    assert main([*COMMAND, *data, *options]) != 0
    errors = capsys.readouterr().err
    assert says in errors
    assert errors.count("error:") == 1
    assert not (file.parent / "runs").exists()


@pytest.mark.parametrize("name", ["grpo-nano", "dpo-nano"])
def test_other_tunings_refuse_it(name: str, file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", name, "--base", "nano", "--data", str(file), "--streaming"]) != 0
    assert "--streaming is of instruction tuning" in capsys.readouterr().err
