"""Arrow files, text files, patterns of paths, saved datasets and slices: the rows that were written."""

from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from builders.conversations import write_json_rows
from builders.datasets import JSON_ROWS, ROWS

from fgpt.data import arrow_files
from fgpt.data.dataset_folders import read_folder
from fgpt.data.instruction_datasets import HUB_DATASETS, load_rows
from fgpt.data.prompt_templates import InstructionRow, TextRow
from fgpt.data.sources import locate, open_source
from fgpt.errors import InputError

NUMBERS = [{"instruction": str(i), "output": "x"} for i in range(20)]


def numbers(source: str) -> list[int]:
    return [int(row.instruction) for row in load_rows(source)]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_and_streams(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrow_files, "BATCH", 3)
    table = pyarrow.Table.from_pylist(NUMBERS)
    new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with new(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    assert numbers(str(tmp_path / "a.arrow")) == list(range(20))
    positions = [where for where, _ in open_source(str(tmp_path / "a.arrow"), HUB_DATASETS)[0]]
    assert positions == [f"row {i}" for i in range(1, 21)]
    content = (tmp_path / "a.arrow").read_bytes()
    for bad in (b"ARROW1 no", b"\1\2\3\4\5\6\7\x08", content[: len(content) // 2]):
        (tmp_path / "a.arrow").write_bytes(bad)
        with pytest.raises(
            InputError, match=r"a\.arrow: (not an Arrow file \(|it holds no rows|cannot be read)"
        ) as caught:
            load_rows(tmp_path / "a.arrow")
        assert "\n" not in str(caught.value)


def test_a_folder_that_save_to_disk_has_written(tmp_path: Path):
    data: Any = datasets.Dataset.from_list(NUMBERS)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    assert numbers(str(tmp_path / "one")) == list(range(20))
    assert numbers(f"{tmp_path / 'one'}[-3:]") == [17, 18, 19]
    splits = datasets.DatasetDict({"train": data, "test": data.select(range(5, 8))})
    splits.save_to_disk(tmp_path / "two")
    assert numbers(f"{tmp_path / 'two'}[test]") == [5, 6, 7]
    assert numbers(f"{tmp_path / 'two'}[train[:2]+test[:1]]") == [0, 1, 5]
    with pytest.raises(InputError, match=r"two: no split 'dev'; there are train, test"):
        load_rows(f"{tmp_path / 'two'}[dev]")
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [{"filename": "../secret.arrow"}]}')
    with pytest.raises(InputError, match=r"state\.json: it names data outside the folder"):
        load_rows(tmp_path / "one")


def test_text_files_hold_documents(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo <b>\n<|endoftext|>\n")
    assert load_rows(tmp_path / "a.txt") == [TextRow(output="one"), TextRow(output="two <b>")]
    (tmp_path / "b.txt").write_text("one\n\n")
    assert load_rows(f"{tmp_path}/?.txt[:10]") == [TextRow(output=x) for x in ("one", "two <b>", "one\n\n")]
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"c\.txt: holds no text"):
        load_rows(tmp_path / "c.txt")


def test_patterns_of_paths(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for i in (2, 0, 1):
        write_json_rows(tmp_path / "data" / f"part-{i}.jsonl", *NUMBERS[3 * i : 3 * i + 3])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(NUMBERS[9:]), tmp_path / "data" / "rest.parquet")
    assert numbers(f"{tmp_path}/data/part-*.jsonl") == list(range(9))
    assert numbers(f"{tmp_path}/**/*.*") == list(range(20))
    assert numbers(f"{tmp_path}/data/part-[12].jsonl[-4:]:0.5") == [5, 6, 7, 8]
    with pytest.raises(InputError, match=r"none-\*\.json: no file matches; expected files for the pattern"):
        load_rows(f"{tmp_path}/data/none-*.json")
    with pytest.raises(InputError, match=r"res\*\.parquett: no file matches \(the nearest is .*/rest\.parquet\)"):
        load_rows(f"{tmp_path}/data/res*.parquett")
    bad = write_json_rows(tmp_path / "data" / "part-1.jsonl", NUMBERS[0], {"instruction": "a", "output": 1.5}, {"x": 1})
    with pytest.raises(InputError, match=rf"part-\*\.jsonl, {bad.name}, line 3: no column 'instruction'"):
        load_rows(f"{tmp_path}/data/part-*.jsonl")


def test_slices_of_files_and_folders(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    path = write_json_rows(tmp_path / "mine" / "train.jsonl", *NUMBERS)
    write_json_rows(tmp_path / "mine" / "test.jsonl", *NUMBERS[:4])
    assert numbers(f"{path}[:3]") == numbers(f"{path}[train[:3]]") == [0, 1, 2]
    assert numbers(f"{path}[90%:]") == [18, 19]
    assert numbers(f"{tmp_path / 'mine'}[test[1:]]") == [1, 2, 3]
    assert numbers(f"{tmp_path / 'mine'}[:2]") == [0, 1]
    for text, message in {
        f"{path}[test]": r"a file has no split 'test': slice it without one, such as \[:1000\]",
        f"{path}:config": r"a file on this machine has no config 'config': leave it out",
        f"{path}@v1": r"a file on this machine has no revision 'v1': leave it out",
        f"{tmp_path / 'mine'}[dev]": r"mine: no split 'dev'; there are .*test",
        f"{path}[5:5]": r"it holds no rows, expected at least one",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            load_rows(text)
        assert "\n" not in str(caught.value)


def test_configs_of_a_folder(tmp_path: Path):
    folder = tmp_path / "mine"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        write_json_rows(folder / name / "rows.json", {"instruction": name, "output": "x"}, NUMBERS[0])
    files = "".join(f"- config_name: {name}\n  data_files: {name}/*.json\n" for name in ("a", "b"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    assert load_rows(f"{folder}:b")[0] == InstructionRow("b", "", "x")
    with pytest.raises(
        InputError, match=r"mine: several configs, and none is named; there are a, b: write NAME:CONFIG"
    ):
        load_rows(folder)
    with pytest.raises(InputError, match=r"mine: no config 'c'; there are a, b"):
        load_rows(f"{folder}:c")


def test_where_the_files_of_a_source_are(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    folder = write_json_rows(tmp_path / "mine" / "train.json", *JSON_ROWS).parent
    (tmp_path / "a.jsonl").write_text("")
    path = write_json_rows(tmp_path / "b.jsonl", *JSON_ROWS)
    located, dataset = locate(f"{tmp_path}/*.jsonl[1:]", HUB_DATASETS)
    assert located.files == [tmp_path / "a.jsonl", path]
    assert dataset is None
    assert ForkingPickler.dumps(located)  # a worker process can have it
    assert ForkingPickler.dumps(read_folder(folder))
    assert load_rows(path) == load_rows(folder) == ROWS


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow stream"])
def test_two_columns_of_one_name(kind: str, tmp_path: Path):
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["instruction", "output", "output"])
    path = tmp_path / f"a.{kind.partition(' ')[0]}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(InputError, match=r"two columns are called 'output': give each a name of its own"):
        load_rows(path)
