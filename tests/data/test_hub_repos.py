"""Any dataset on the hub by its name: what is downloaded, what the cache suffices for, and what is refused."""

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from builders.hub import COMMIT, FakeHub, cache_of, hub_is_away

from fgpt.data import classification_datasets, instruction_datasets
from fgpt.data.instruction_datasets import InstructionDataset, load_rows
from fgpt.errors import InputError

CARD = """---
configs:
- config_name: big
  data_files:
  - split: train
    path: big/train-*.parquet
  - split: test
    path: big/test.parquet
- config_name: small
  data_files: small.csv
---
Mine.
"""


def lines(*names: str) -> bytes:
    return "\n".join(json.dumps({"instruction": name, "output": "x"}) for name in names).encode()


def parquet(*names: str) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"instruction": n, "output": "x"} for n in names]), out)
    return out.getvalue()


FILES = {
    "README.md": CARD.encode(),
    "big/train-00000-of-00002.parquet": parquet("0"),
    "big/train-00001-of-00002.parquet": parquet("1"),
    "big/test.parquet": parquet("t0", "t1", "t2"),
    "small.csv": b"instruction,output\ns,007\n",
    "mine.py": b"raise SystemExit('never run')",
}
PLAIN = {"data/train.json": lines("a", "b"), "data/test.json": b'[{"instruction": "c", "output": "d"}]'}


def read(source: str) -> list[str]:
    return [row.instruction for row in load_rows(source)]


def downloads(fake: FakeHub) -> set[str]:
    return {path.partition("/resolve/")[2].partition("/")[2].partition("?")[0] for path in fake.asked} - {""}


def test_a_config_and_a_split_and_no_other_file(fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    fake.files = dict(FILES)
    assert read("me/mine:big[test]") == ["t0", "t1", "t2"]
    assert downloads(fake) == {"README.md", "big/test.parquet"}
    assert read("me/mine:big") == ["0", "1"]
    assert load_rows("me/mine:small")[0].output == "007"
    assert read("me/mine:big[train[1:]+test[:1]]:0.5") == ["1", "t0"]
    assert "mine.py" not in downloads(fake)
    fake.asked.clear()
    assert read("me/mine:big[:1]") == ["0"]
    assert not fake.asked
    hub_is_away(monkeypatch)
    assert read("me/mine:big") == ["0", "1"]


def test_files_by_their_names_without_a_card(fake: FakeHub):
    fake.files = dict(PLAIN)
    assert read("me/it") == ["a", "b"]
    assert downloads(fake) == {"data/train.json"}
    assert read("me/it[test]") == ["c"]
    fake.files = {"x.jsonl": lines("only")}
    assert read("you/other") == ["only"]


def test_a_revision(fake: FakeHub):
    fake.files = dict(PLAIN)
    assert read("me/it@refs/convert/parquet[:1]") == ["a"]
    assert any("refs%2Fconvert%2Fparquet" in path for path in fake.asked)
    assert COMMIT in "".join(fake.asked)


def test_a_known_dataset_keeps_its_columns(fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    columns = instruction_datasets.Columns("question", output="reply")
    monkeypatch.setitem(instruction_datasets.HUB_DATASETS, "made", InstructionDataset("me/it", "train.jsonl", columns))
    row = json.dumps({"question": "q", "reply": "r"}).encode()
    fake.files = {"train.jsonl": row, "test.jsonl": row + b"\n" + row}
    assert [len(read(text)) for text in ("made[train[:5]]", "made[test]", "made@v1[test[:1]]")] == [1, 2, 1]


def test_labeled_texts_of_any_dataset(fake: FakeHub):
    fake.files = {f"{name}.csv": f"text,label\n{name},1\n".encode() for name in ("train", "test")}
    for split in ("train", "test"):
        (row,) = classification_datasets.load_labeled_texts("me/it", split)
        assert row.text == split


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("me/mine", r"me/mine: several configs, and none is named; there are big, small: write NAME:CONFIG"),
        ("me/mine:bog", r"me/mine: no config 'bog'; there are big, small"),
        ("me/mine:big[dev]", r"me/mine: no split 'dev'; there are train, test"),
    ],
)
def test_configs_and_splits_that_are_not_there(source: str, message: str, fake: FakeHub):
    fake.files = dict(FILES)
    with pytest.raises(InputError, match=message) as caught:
        load_rows(source)
    assert "\n" not in str(caught.value)
    assert downloads(fake) == {"README.md"}


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "RepoNotFound", r"the hub has no dataset me/it, or it is private \(HTTP 401\): .* `hf auth login`$"),
        (404, "RepoNotFound", r"the hub has no dataset me/it, or it is private \(HTTP 404\)"),
        (403, "GatedRepo", r"the hub refuses me/it \(HTTP 403\): accept its terms at https://"),
        (404, "RevisionNotFound", r"the hub's me/it has no revision 'v9': expected a branch, tag or commit"),
        (500, "", r"the hub gave no 'me/it' \("),
    ],
)
def test_what_the_hub_answers(status: int, code: str, message: str, fake: FakeHub):
    fake.files, fake.refuse = dict(PLAIN), lambda path: (status, code)
    with pytest.raises(InputError, match=message) as caught:
        load_rows("me/it@v9")
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_away(tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    fake.files = dict(FILES)
    assert read("me/mine:big[test]") == ["t0", "t1", "t2"]
    hub_is_away(monkeypatch)
    with pytest.raises(InputError, match=r"the hub gave no 'me/mine' \(.*: connect and try again"):
        read("me/mine:big")
    with pytest.raises(InputError, match=r"the hub gave no 'me/new' \("):
        read("me/new")
    cache_of(tmp_path, {"train-00000-of-00002.jsonl": lines("a")}, "datasets", "you--part")
    with pytest.raises(InputError, match=r"the local cache of you/part lacks train-00001-of-00002\.jsonl"):
        read("you/part")
    cache_of(tmp_path, {f"train-0000{i}-of-00002.jsonl": lines(str(i)) for i in range(2)}, "datasets", "you--all")
    assert read("you/all") == ["0", "1"]


def test_repositories_that_cannot_be_read(fake: FakeHub):
    cases: dict[str, tuple[dict[str, bytes], str]] = {
        "me/a": (
            {"a.py": b"", "README.md": b"---\n---\n"},
            r"me/a: its data come from a program, a\.py, and no program",
        ),
        "me/b": ({"model.bin": b""}, r"me/b: expected a folder in the layout of a dataset"),
        "me/c": ({"../x.jsonl": b"{}"}, r"the hub's me/c names a file '\.\./x\.jsonl': expected paths within it"),
        "me/d": (
            {"a.csv": b"", "README.md": b"---\nconfigs:\n- config_name: a\n  data_files: https://x.y/a.csv\n---\n"},
            r"data outside the folder, 'https://x\.y/a\.csv'",
        ),
    }
    for name, (files, message) in cases.items():
        fake.files = files
        with pytest.raises(InputError, match=message) as caught:
            load_rows(name)
        assert "\n" not in str(caught.value)
        assert "/tmp" not in str(caught.value)


def test_misspelled_names(fake: FakeHub, tmp_path: Path):
    (tmp_path / "train.jsonl").write_bytes(lines("a"))
    for source, message in {
        "alpacca": r"^unknown source 'alpacca': expected one of alpaca, .*; did you mean alpaca\?$",
        f"{tmp_path}/trian.jsonl": r"trian\.jsonl: no such file \(the nearest is .*/train\.jsonl\); expected a path",
        "data/gone.jsonl": r"^data/gone\.jsonl: no such file; expected a path or one of alpaca",
    }.items():
        with pytest.raises(InputError, match=message):
            load_rows(source)
    assert not fake.asked
