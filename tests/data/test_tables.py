"""CSV and TSV: quotes, long fields, many columns, nothing that is never NaN."""

import csv
import time
from pathlib import Path
from typing import Any

import pytest

from fgpt.data.instruction_datasets import Columns, load_rows
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError

PANDAS = [("instruction", "output"), ('Say "hi" to her.', 'He said "hi".'), ("a\tb", "two\nlines"), ("plain", "'it'")]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quoted_tsv(quoting: Any, end: str, tmp_path: Path):
    """As pandas and R write them: pandas hands its rows to this writer."""
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting, lineterminator=end).writerows(PANDAS)
    assert load_rows(tmp_path / "a.tsv") == [InstructionRow(a, "", b) for a, b in PANDAS[1:]]


@pytest.mark.parametrize("field", ['"We know', 'It "is"', 'so"', '"', '"quoted whole"', '""', '"a" and "b"'])
def test_a_plain_tsv(field: str, tmp_path: Path):
    """In a file whose writer quotes nothing a quotation mark is only itself, as in GLUE's."""
    (tmp_path / "a.tsv").write_text(f"instruction\toutput\nWho?\t{field}\n{field}\tx\n")
    assert load_rows(tmp_path / "a.tsv") == [InstructionRow("Who?", "", field), InstructionRow(field, "", "x")]


def test_fields_of_any_length_and_many_columns(tmp_path: Path):
    long = "word " * 60_000
    for end, mark in ((".csv", ","), (".tsv", "\t")):
        (tmp_path / f"a{end}").write_text(f"instruction{mark}output\n{long}{mark}x\n")
        assert load_rows(tmp_path / f"a{end}") == [InstructionRow(long, "", "x")]
    names = [f"c{i}" for i in range(200_000)]
    (tmp_path / "wide.csv").write_text("\n".join([",".join(names), ",".join(["1"] * len(names))]))
    begin = time.perf_counter()
    assert load_rows(tmp_path / "wide.csv", Columns("c7", output="c199999")) == [InstructionRow("1", "", "1")]
    with pytest.raises(InputError, match=r"there are 'c0', .* and 199,980 more: name the columns") as caught:
        load_rows(tmp_path / "wide.csv")
    assert len(str(caught.value)) < 600
    assert time.perf_counter() - begin < 10  # 0.2 s alone; comparing each name with all before it took minutes


def test_nothing_is_never_the_text_nan(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "input": NaN, "output": "b"}')
    assert load_rows(tmp_path / "a.jsonl") == [InstructionRow("a", "", "b")]
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": NaN}')
    with pytest.raises(InputError, match=r"line 1: column 'output' should hold text, got NaN"):
        load_rows(tmp_path / "a.jsonl")
