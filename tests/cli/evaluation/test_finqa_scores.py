"""FinQA's answers: numbers that are right however they are written."""

import re
from typing import Any

import pytest
from builders import SharedData
from builders.finqa import FINQA_RECORD
from hypothesis import given
from hypothesis import strategies as st

from fgpt.cli.evaluation.compare.results import Answer
from fgpt.cli.evaluation.compare.scores import instruction_scores
from fgpt.cli.evaluation.metrics.finqa import is_correct, quantities, score
from fgpt.data.finqa import read_finqa
from fgpt.data.instruction_datasets import load_rows
from fgpt.data.prompt_templates import InstructionRow


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        ("11%", "11%", True),
        ("11.2%", "11%", True),  # rounded to the reference's decimals
        ("11.5%", "11%", False),
        ("11.5%", "12%", True),
        ("11%", "11.2%", False),  # of fewer decimals
        ("11.20%", "11.2%", True),
        ("11", "11%", True),  # the sign forgotten
        ("0.112", "11%", True),  # or the fraction it means
        ("11.2%", "0.112", True),
        ("0.11%", "11%", False),
        ("-8.7%", "-8.7%", True),
        ("8.7%", "-8.7%", False),
        ("(8.7)%", "-8.7%", True),
        ("( 8.7 % )", "-8.7%", True),
        ("\u22128.7 %", "-8.7%", True),
        ("$ 1,234.5", "1234.5", True),
        ("-$5", "-5", True),
        ("$ ( 5 )", "-5", True),
        ("-5.5 ( 5.5 )", "-5.5", True),  # as FinQA's own tables write it
        ("$ 5.5 million", "5.5", True),
        ("5,500,000", "$ 5.5 million", True),
        ("5.5 ( in millions )", "$ 5.5 million", True),
        ("5,500 (in thousands)", "$ 5.5 million", True),
        ("5.5 billion", "5.5 million", False),
        ("530.4", "530", True),
        ("24.0", "24", True),
        ("It rose by 11% from 2009 to 2010.", "11%", True),  # years are not the answer
        ("2010", "2010", True),  # but where there is nothing else
        ("222510 - 200077 = 22433", "22433", True),
        ("The change of 2009-2010 was 5", "5", True),
        ("It fell from 99-90", "90", True),  # a dash between two numbers is no sign
        ("It fell by 99 - 90", "90", True),
        ("In 2012 -90", "-90", True),
        ("22433 / 200077 = 11.2%\nso the answer is 7%", "11%", True),  # the first line
        ("\n\n11%", "11%", True),
        ("5.5x", "5.5", False),
        ("1" * 40, "11%", False),
        ("", "11%", False),
        ("I do not know.", "11%", False),
        ("Yes.", "yes", True),
        ("yes, it did", "yes", True),
        ("The answer is no", "no", True),
        ("no", "yes", False),
        ("It is not so.", "no", False),
        ("1", "yes", False),
        ("Increased.", "increased", True),
        ("It increased", "increased", False),
    ],
)
def test_right_by_hand(answer: str, reference: str, is_right: bool):
    assert is_correct(answer, reference) is is_right


@given(st.decimals(-(10**9), 10**9, places=2), st.sampled_from(["{}", "${:,}", "{}%", "it was {} ."]))
def test_a_number_is_itself_however_it_is_written(number: Any, look: str):
    text = look.format(number)
    assert is_correct(text, str(number))
    assert not is_correct(text, str(number + 1)) or 1900 <= number <= 2100


def test_only_finqa_rows_count():
    finqa = [read_finqa(FINQA_RECORD, ""), read_finqa(FINQA_RECORD | {"qa": {"question": "q", "answer": "no"}}, "")]
    silent = read_finqa(FINQA_RECORD | {"qa": {"question": "q"}}, "")
    given_rows = [InstructionRow("Add.", "", "10%"), *finqa, silent]
    assert score(given_rows, ["10%", "10.2 %", "yes", "10%"]) == {"FinQA exact match (%)": 50, "FinQA rows": 2}
    assert score(given_rows[:1], ["10%"]) == score([silent], ["5"]) == {}
    answers = [Answer(text, (1,), True) for text in ("a", "10%", "no", "")]
    assert instruction_scores(given_rows, answers)["FinQA exact match (%)"] == 100


def test_the_references_of_real_rows_are_right_and_their_neighbors_wrong(shared_data: SharedData):
    path = shared_data("dolly") / "dolly_finqa_val.jsonl"
    rows = [row for row in load_rows(path) if row.input]  # its Dolly rows have lost theirs
    assert len(rows) == 60
    for row in rows:
        (number,) = quantities(row.output)
        other = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), row.output)
        assert is_correct(f"The answer is {row.output}.", row.output), row.output
        assert not is_correct(other, row.output), (number, other)
