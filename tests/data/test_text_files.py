"""Byte order marks and compression change nothing; damaged compression is one line."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from builders.datasets import JSON_ROWS, ROWS

from fgpt.cli.evaluation.compare import prompt_file
from fgpt.data import classification_datasets
from fgpt.data.documents import read as read_documents
from fgpt.data.instruction_datasets import load_rows
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError
from fgpt.io.files import read_text

PACK: dict[str, Any] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def compressed_bytes(end: str, content: bytes) -> bytes:
    if end in PACK:
        return PACK[end](content)
    return pyarrow.compress(content, codec="zstd", asbytes=True)


CONTENTS = {
    ".json": json.dumps(JSON_ROWS),
    ".jsonl": "\n".join(map(json.dumps, JSON_ROWS)),
    ".csv": 'instruction,input,output\na,b,"c\n\u2028d"\né,,{x}\n',
    ".tsv": 'instruction\tinput\toutput\na\tb\t"c\n\u2028d"\né\t\t{x}\n',
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("pack", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("end", CONTENTS)
def test_marks_and_compression_change_nothing(end: str, pack: str, mark: bytes, tmp_path: Path):
    content = mark + CONTENTS[end].encode()
    path = tmp_path / f"a{end}{pack}"
    path.write_bytes(compressed_bytes(pack, content) if pack else content)
    assert load_rows(path) == ROWS
    assert prompt_file.read(str(path)) == ROWS


@pytest.mark.parametrize("pack", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_every_reader_of_texts_takes_marks_and_compression(pack: str, tmp_path: Path):
    def put(name: str, text: str) -> Path:
        content = b"\xef\xbb\xbf" + text.encode()
        (tmp_path / f"{name}{pack}").write_bytes(compressed_bytes(pack, content) if pack else content)
        return tmp_path / f"{name}{pack}"

    assert read_documents(put("a.txt", "One day.<|endoftext|>Two days.")) == ["One day.", "Two days."]
    assert classification_datasets.load_labeled_texts(str(put("b.txt", "glad;joy\n"))) == [
        classification_datasets.LabeledText("glad", "", "joy")
    ]
    assert classification_datasets.load_labeled_texts(str(put("b.csv", "text,label\nglad,joy\n")))[0].text == "glad"
    if not pack:
        assert read_text(put("c.txt", "One day.")) == "One day."


def test_files_put_together_keep_their_marks(tmp_path: Path):
    mark = b"\xef\xbb\xbf"
    part = mark + b'{"instruction": "a", "output": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(part + part)
    assert load_rows(tmp_path / "a.jsonl") == [InstructionRow("a", "", "b")] * 2
    for end, comma in ((".csv", b","), (".tsv", b"\t")):
        (tmp_path / f"a{end}").write_bytes(
            b"instruction,output\na,b\n".replace(b",", comma) + mark + b'"a"' + comma + b"b\n"
        )
        assert [row.instruction.strip('"') for row in load_rows(tmp_path / f"a{end}")] == ["a", "a"]
    (tmp_path / "a.txt").write_bytes((mark + b"glad;joy\n") * 2)
    assert [row.text for row in classification_datasets.load_labeled_texts(str(tmp_path / "a.txt"))] == ["glad", "glad"]


@pytest.mark.parametrize("pack", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_compression_is_one_line(pack: str, tmp_path: Path):
    whole = compressed_bytes(
        pack, "\n".join(json.dumps({"instruction": str(i), "output": "x"}) for i in range(9_999)).encode()
    )
    middle = len(whole) // 2
    for content in (
        b'{"instruction": "a", "output": "b"}',
        whole[:middle],
        whole[:middle] + bytes(40) + whole[middle:],
    ):
        (tmp_path / f"a.jsonl{pack}").write_bytes(content)
        with pytest.raises(
            InputError, match=rf"a\.jsonl\{pack}: damaged, or not compressed as its name says"
        ) as caught:
            load_rows(tmp_path / f"a.jsonl{pack}")
        assert "\n" not in str(caught.value)
    (tmp_path / f"a.parquet{pack}").write_bytes(whole)
    with pytest.raises(InputError, match="cannot tell its format"):
        load_rows(tmp_path / f"a.parquet{pack}")
