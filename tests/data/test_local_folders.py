"""A local folder stays local; its links; its tables keep text as text."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from builders.datasets import load_rows_elsewhere

from fgpt.data import classification_datasets
from fgpt.data.instruction_datasets import load_rows
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError


@pytest.mark.parametrize(
    "files",
    [
        "https://127.0.0.1:9/train.csv",
        "hf://datasets/some/one/train.csv",
        "../secret.csv",
        "data/../../secret.csv",
        "{secret}",
        "file://{secret}",
        "[train.csv, ../secret.csv]",
        "[{{split: train, path: ../secret.csv}}]",
        "{{train: [../secret.csv]}}",
    ],
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_local_folder_stays_local(card: str, files: str, tmp_path: Path):
    (tmp_path / "secret.csv").write_text("instruction,output\nsecret,secret\n")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.csv").write_text("instruction,output\na,b\n")
    named = files.format(secret=tmp_path / "secret.csv")
    text = f"configs:\n- config_name: default\n  data_files: {named}\n"
    (folder / card).write_text(f"---\n{text}---\nMine.\n" if card.endswith(".md") else text)
    with pytest.raises(InputError, match=r"data outside the folder, .*: expected files in the folder") as caught:
        load_rows(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_folder_s_own_words_on_its_files_count(tmp_path: Path):
    (tmp_path / "mine" / "parts").mkdir(parents=True)
    (tmp_path / "mine" / "parts" / "one.csv").write_text("instruction,output\na,b\n")
    (tmp_path / "mine" / "train.csv").write_text("instruction,output\nold,old\n")
    card = "---\nsource: https://example.org/..\nconfigs:\n- config_name: default\n  data_files: parts/*.csv\n---\n"
    (tmp_path / "mine" / "README.md").write_text(card)
    assert load_rows_elsewhere(tmp_path, str(tmp_path / "mine"), HF_HUB_OFFLINE="1") == str(
        [InstructionRow("a", "", "b")]
    )
    (tmp_path / "mine" / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(InputError, match=r"README\.md: its YAML cannot be read"):
        load_rows(tmp_path / "mine")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `datasets` library with an empty cache and no network."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


TEXTS_LIKE_NUMBERS = ["NA", "None", "null", "NaN ", "007", "1", "True", "False", "1.50", "1e3", ""]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("end", "mark"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_text_in_a_folder_of_tables_stays_text(end: str, mark: str, tmp_path: Path):
    """No value is guessed to be a number, a truth value or missing: a folder holds what each of its files holds."""
    lines = [mark.join(("instruction", "input", "output")), *(mark.join(("Say:", x, "ok")) for x in TEXTS_LIKE_NUMBERS)]
    content = "\n".join(lines) + "\n"
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / f"train{end}").write_bytes(gzip.compress(content.encode()) if end.endswith(".gz") else content.encode())
    assert [row.input for row in load_rows(folder)] == TEXTS_LIKE_NUMBERS
    assert load_rows(folder) == load_rows(folder / f"train{end}")


@pytest.mark.usefixtures("offline")
def test_labels_in_a_folder_of_tables_stay_apart(tmp_path: Path):
    files = {"data/train.csv": "text,label\na,01\nb,1\n", "data/test.csv": "text,label\nNA,True\nnone,1\n"}
    folder = str(write_files(tmp_path / "mine", files))
    rows = classification_datasets.load_labeled_texts
    assert [row.label for row in rows(folder)] == ["01", "1"]
    assert [(row.text, row.label) for row in rows(folder, "test")] == [("NA", "True"), ("none", "1")]


@pytest.mark.usefixtures("offline")
def test_a_folder_of_tables_in_parts_and_with_a_separator(tmp_path: Path):
    parts = {f"data/train-{i}.csv": f"instruction,output\n{i},0{i}\n" for i in range(2)}
    assert [row.output for row in load_rows(write_files(tmp_path / "parts", parts))] == ["00", "01"]
    card = "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  {}\n---\n"
    for separator in (";", "|", "\t"):
        table = {"a.csv": f"instruction{separator}output\na,b{separator}007\n"}
        folder = write_files(tmp_path / "mine", table | {"README.md": card.format(f"sep: {json.dumps(separator)}")})
        assert load_rows(folder) == [InstructionRow("a,b", "", "007")]
    write_files(folder, {"README.md": card.format("skiprows: 1")})
    with pytest.raises(InputError, match=r"mine: its README\.md sets skiprows for its tables: expected `sep` alone"):
        load_rows(folder)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("end", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("link", ["file", "folder", "card"])
def test_a_link_out_of_a_local_folder_is_refused(link: str, end: str, tmp_path: Path):
    secret, folder = tmp_path / "secret" / f"train{end}", tmp_path / "mine"
    secret.parent.mkdir()
    folder.mkdir()
    table = pyarrow.Table.from_pylist([{"instruction": "secret", "output": "secret"}])
    if end == ".parquet":
        pyarrow.parquet.write_table(table, secret)
    else:
        secret.write_text("instruction,output\na,b\n" if end == ".csv" else '{"instruction": "a", "output": "b"}\n')
    if link == "file":
        (folder / secret.name).symlink_to(secret)
    elif link == "folder":
        (folder / "data").symlink_to(secret.parent)
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/train.*\n---\n")
    else:
        (folder / secret.name).write_bytes(secret.read_bytes())
        (tmp_path / "card.md").write_text("---\n---\n")
        (folder / "README.md").symlink_to(tmp_path / "card.md")
    with pytest.raises(InputError, match=r"mine/.*: a link to a file outside the folder, .*: put the file itself"):
        load_rows(folder)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("end", [".csv", ".parquet"])
def test_links_within_a_folder_and_into_the_hub_s_cache_are_followed(end: str, tmp_path: Path):
    """The files of a cache's snapshot are links into the blobs beside it."""
    repo = tmp_path / "hub" / "datasets--me--it"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    (snapshot / "data").mkdir(parents=True)
    blobs.mkdir()
    if end == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"instruction": "a", "output": "b"}]), blobs / "123")
    else:
        (blobs / "123").write_text("instruction,output\na,b\n")
    (snapshot / "data" / f"train{end}").symlink_to("../../../blobs/123")
    for folder in (snapshot, snapshot / "data"):
        assert load_rows(folder) == [InstructionRow("a", "", "b")]
    folder = tmp_path / "mine"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / f"one{end}").write_bytes((blobs / "123").read_bytes())
    (folder / f"train{end}").symlink_to(f"parts/one{end}")
    (tmp_path / "link").symlink_to(folder)
    for at in (folder, tmp_path / "link"):
        assert load_rows(at) == [InstructionRow("a", "", "b")]
    stranger = tmp_path / "other" / "snapshots" / "abc"
    stranger.mkdir(parents=True)
    (tmp_path / "other" / "blobs").symlink_to(blobs)
    (stranger / f"train{end}").symlink_to("../../blobs/123")
    with pytest.raises(InputError, match="a link to a file outside the folder"):
        load_rows(stranger)


def test_tables_of_several_formats_are_not_dropped_in_silence(tmp_path: Path):
    """The library `datasets` would read the one format that has most files."""
    (tmp_path / "a.csv").write_text("instruction,output\na,b\n")
    (tmp_path / "b.jsonl").write_text('{"instruction": "c", "output": "d"}\n')
    (tmp_path / "notes.txt").write_text("of no concern")
    with pytest.raises(InputError, match=r"a\.csv has another format than b\.jsonl.*give a pattern"):
        load_rows(tmp_path)
    assert len(load_rows(f"{tmp_path}/[ab].*")) == 2
    (tmp_path / "a.csv").unlink()
    assert len(load_rows(tmp_path)) == 1
