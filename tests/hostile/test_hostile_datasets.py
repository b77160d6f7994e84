"""Spoiled datasets."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from builders.hostile_files import assert_enough, outcome_of
from builders.mutations import DEEP, bit_flips, each_in_turn, mutations, truncations
from torch import Tensor

from fgpt.data import classification_datasets, instruction_datasets

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Add 2 and 3.", "input": "2, 3", "output": "5"},
    {"instruction": "Say \"hello\", then 'bye'", "input": "", "output": "hello;\nbye"},
    {"instruction": "Zähle", "input": "a\tb", "output": "1"},
]
TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"conversations": ["Hi", "Ho"]},
    {
        "pre_text": ["a"],
        "post_text": ["b"],
        "table": [["x", "1"]],
        "qa": {"question": "?", "answer": "1", "exe_ans": 1},
    },
]
LABELLED: list[dict[str, Any]] = [{"text": "good; really", "label": "pos"}, {"text": "bad", "label": 0}]


def rows_said(found: Any, expected: list[Any]) -> None:
    """Asserts that rows are those that plain records make."""
    assert len(found) == len(expected)
    for row, record in zip(found, expected):
        if (
            isinstance(record, dict)
            and {"instruction", "output"} <= record.keys()
            and not isinstance(row.output, Tensor)
        ):
            assert row.instruction == str(record["instruction"])
            assert row.output == str(record["output"])
            assert row.input == ("" if record.get("input") is None else str(record["input"]))


def labels_said(found: Any, expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for row, record in zip(found, expected):
        assert (row.text, row.label) == (str(record["text"]).strip(), str(record["label"]).strip())


def write_rows(records: list[dict[str, Any]], end: str) -> bytes:
    if end in (".csv", ".tsv"):
        out = io.StringIO(newline="")
        dialect: dict[str, Any] = (
            {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "escapechar": "\\"} if end == ".tsv" else {}
        )
        rows = (
            [{k: re.sub(r"[\n\t\"]", " ", str(x)) for k, x in r.items()} for r in records] if end == ".tsv" else records
        )
        writer = csv.DictWriter(out, list(records[0]), **dialect)
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()
    if end == ".parquet":
        import pyarrow as pa

        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([{k: str(x) for k, x in r.items()} for r in records]), out)
        return out.getvalue()
    if end == ".txt":
        return "".join(f"{r['text']};{r['label']}\n" for r in records).encode()
    return ("\n".join(map(json.dumps, records)) if end == ".jsonl" else json.dumps(records)).encode()


def records_said(path: Path) -> list[Any]:
    """The records of a file by a reader that is not ours."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if path.suffix == ".txt":
        lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
        return [dict(zip(("text", "label"), line.rsplit(";", 1))) for line in lines]
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    return list(csv.DictReader(io.StringIO(text, newline=""), **options))


@pytest.mark.parametrize("end", [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt"])
@pytest.mark.parametrize("what", ["rows", "labels"])
def test_spoiled_datasets(what: str, end: str, tmp_path: Path):
    if (what, end) == ("rows", ".txt"):
        pytest.skip("rows of text are in no .txt")
    read, agreed = (
        (instruction_datasets.load_rows, rows_said)
        if what == "rows"
        else (classification_datasets.load_labeled_texts, labels_said)
    )
    records: Any = RECORDS if what == "rows" else LABELLED
    path = tmp_path / f"data{end}"
    data = write_rows(records, end)

    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        if found := outcome_of("datasets", path, lambda: read(str(path))):
            agreed(found, records_said(path))

    check(data)
    assert read(str(path))
    for corrupt in (*truncations(data, 8), *bit_flips(data, 20)):
        check(corrupt)
    if end in (".json", ".jsonl"):
        for text in DEEP:
            check(text.encode("utf-8", "surrogatepass"))

        def text_of(text: str) -> bytes:
            one = text if end == ".json" else text.replace("\n", " ")
            return one.encode("utf-8", "surrogatepass")

        value = [*records, *TALKS] if what == "rows" else records
        each_in_turn(30, mutations(value if end == ".json" else value[-1]), lambda text: check(text_of(text)))
    else:
        for corrupt in (data + b"\0", data + b"a,b,c,d,e\n", data + b'"open', data + b"\xff", data * 3, b"\n\n", b"\0"):
            check(corrupt)
        check(data + b'"' + b"x" * 200_000 + b'"\n')
    assert_enough("datasets", 11)
