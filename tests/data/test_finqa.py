"""FinQA: pages that lose the middle of their text alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders.finqa import FINQA_RECORD
from hypothesis import given
from hypothesis import strategies as st

from fgpt.cli.evaluation.compare.prompt_file import read as read_prompts
from fgpt.data.finqa import ELLIPSIS, FinQA, read_finqa, shorten
from fgpt.data.instruction_datasets import Columns, load_rows
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError

PAGE = (
    "sales rose in 2012 . all sums are in millions .\n"
    " | 2011 | 2012\nsales | $ 90 | $ 99\nnet loss | ( 3 ) | ( 2 )\n"
    "see note 4 ."
)


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_page_is_text_table_text(tmp_path: Path):
    (tmp_path / "train.json").write_text(json.dumps([FINQA_RECORD]))
    (row,) = load_rows(tmp_path / "train.json")
    assert isinstance(row, FinQA)
    assert (row.instruction, row.input, row.output) == ("by how much did sales rise?", PAGE, "10%")
    assert row.table == PAGE.partition("\n")[2].rpartition("\n")[0]
    assert read_prompts(str(tmp_path / "train.json")) == [row]


@pytest.mark.parametrize(
    ("qa", "output"),
    [
        ({"answer": " 10% ", "exe_ans": 0.1}, "10%"),
        ({"answer": "", "exe_ans": 0.10345}, "0.10345"),  # some were never written down
        ({"answer": "", "exe_ans": "yes"}, "yes"),
        ({"answer": None}, ""),  # the files of the competition have none
    ],
)
def test_which_answer(qa: dict[str, Any], output: str):
    assert read_finqa(FINQA_RECORD | {"qa": {"question": "q"} | qa}, "row 1").output == output


def test_a_flat_copy_reads_alike():
    flat = {name: x for name, x in FINQA_RECORD.items() if name != "qa"} | FINQA_RECORD["qa"]
    assert read_finqa(flat, "row 1") == read_finqa(FINQA_RECORD, "row 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_text": "a"}, "expected pre_text and post_text to be lists of sentences"),
        ({"post_text": [1]}, "expected pre_text and post_text to be lists of sentences"),
        ({"table": [["a"], "b"]}, "expected the table to be a list of rows, each a list of cells"),
        ({"qa": {"answer": "1"}}, "expected qa to hold a question"),
        ({"qa": []}, "expected qa to hold a question"),
    ],
)
def test_bad_records_are_one_line(change: dict[str, Any], message: str, tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([FINQA_RECORD, FINQA_RECORD | change]))
    with pytest.raises(InputError, match=rf"a\.json, row 2: {message}.*: fix the row$") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)


def test_several_sources_are_one(tmp_path: Path):
    dolly, finqa, odd = tmp_path / "dolly.jsonl", tmp_path / "train.json", tmp_path / "a+b.jsonl"
    dolly.write_text(json.dumps({"instruction": "a", "context": "b", "response": "c"}))
    finqa.write_text(json.dumps([FINQA_RECORD] * 2))
    odd.write_text(json.dumps({"instruction": "d", "output": "e"}))
    names = Columns("instruction", "context", "response")
    one = read_finqa(FINQA_RECORD, "")
    assert [*load_rows(dolly, names), *load_rows(finqa, names)] == [InstructionRow("a", "b", "c"), one, one]
    assert load_rows(odd) == [InstructionRow("d", "", "e")]
    with pytest.raises(InputError, match=r"^unknown source 'dollly': expected one of alpaca, dolly"):
        load_rows("dollly")
    with pytest.raises(InputError, match=r"gone\.json: no such file"):
        load_rows("gone.json")


# ---------------------------------------------------------------------------------------------------------- shortening


def length(row: InstructionRow) -> int:
    return len(row.instruction.split()) + len(row.input.split()) + len(row.output.split())


@given(st.integers(0, 40), st.integers(0, 40), st.integers(8, 90))
def test_the_middle_of_the_text_goes_and_nothing_else(before: int, after: int, width: int):
    record = FINQA_RECORD | {"pre_text": [f"b{i}" for i in range(before)], "post_text": [f"a{i}" for i in range(after)]}
    row, other = read_finqa(record, ""), InstructionRow("say " * 99, "", "no")
    (got, same), count = shorten([row, other], width, length)
    assert same is other  # FinQA's alone
    least = 7 + len(row.table.split()) + sum(n > 0 for n in (before, after))  # a gap for each text
    if length(row) <= width or width < least:
        assert (got, count) == (row, 0)
        return
    assert isinstance(got, FinQA)
    assert count == 1
    assert length(got) <= width
    assert (got.instruction, got.table, got.output) == (row.instruction, row.table, row.output)
    assert f"\n{got.table}\n" in f"\n{got.input}\n"
    remaining = []
    for text, whole in ((got.before, row.before), (got.after, row.after)):
        head, gap, tail = text.partition(ELLIPSIS)
        assert whole.startswith(head.strip())
        assert whole.endswith(tail.strip()) or not gap
        assert gap or text == whole
        assert 0 <= len(head.split()) - len(tail.split()) <= 1 or not gap
        remaining.append(len(head.split()) + len(tail.split()))
    if min(before, after) > min(remaining):  # both lose words: then both alike
        assert abs(remaining[0] - remaining[1]) <= 1
    assert width - length(got) <= 1  # no more than it takes; a gap may be a word more than what it stands for
