"""FinQA: pages that lose the middle of their text alone, answers compared as numbers, and the runs that use it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from builders import SharedData, gpt2_shape
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.cli.evaluation.compare.prompt_file import read as read_prompts
from fgpt.cli.evaluation.compare.results import Answer
from fgpt.cli.evaluation.compare.scores import instruction_scores
from fgpt.cli.evaluation.metrics.finqa import is_correct, quantities, score
from fgpt.cli.main import main
from fgpt.cli.training.build import build_adapters
from fgpt.data.finqa import ELLIPSIS, FinQA, read_finqa, shorten
from fgpt.data.instruction_datasets import Columns, load_rows
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError
from fgpt.recipes import RECIPES, InstructionRecipe, find

RECORD: dict[str, Any] = {
    "pre_text": ["sales rose in 2012 .", "all sums are in millions ."],
    "table": [["", "2011", "2012"], ["sales", "$ 90", "$ 99"], ["net\nloss", "( 3 )", "( 2 )"]],
    "post_text": ["see note 4 ."],
    "qa": {"question": "by how much did sales rise?", "answer": "10%", "exe_ans": 0.1, "program": "divide(9, 90)"},
}
PAGE = (
    "sales rose in 2012 . all sums are in millions .\n"
    " | 2011 | 2012\nsales | $ 90 | $ 99\nnet loss | ( 3 ) | ( 2 )\n"
    "see note 4 ."
)


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_page_is_text_table_text(tmp_path: Path):
    (tmp_path / "train.json").write_text(json.dumps([RECORD]))
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
    assert read_finqa(RECORD | {"qa": {"question": "q"} | qa}, "row 1").output == output


def test_a_flat_copy_reads_alike():
    flat = {name: x for name, x in RECORD.items() if name != "qa"} | RECORD["qa"]
    assert read_finqa(flat, "row 1") == read_finqa(RECORD, "row 1")


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
    path.write_text(json.dumps([RECORD, RECORD | change]))
    with pytest.raises(InputError, match=rf"a\.json, row 2: {message}.*: fix the row$") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)


def test_several_sources_are_one(tmp_path: Path):
    dolly, finqa, odd = tmp_path / "dolly.jsonl", tmp_path / "train.json", tmp_path / "a+b.jsonl"
    dolly.write_text(json.dumps({"instruction": "a", "context": "b", "response": "c"}))
    finqa.write_text(json.dumps([RECORD] * 2))
    odd.write_text(json.dumps({"instruction": "d", "output": "e"}))
    names = Columns("instruction", "context", "response")
    one = read_finqa(RECORD, "")
    assert load_rows(f"{dolly}+{finqa}", names) == [InstructionRow("a", "b", "c"), one, one]
    assert load_rows(f"{finqa} + {dolly}", names, limit=2) == [one, one]
    assert load_rows(odd) == [InstructionRow("d", "", "e")]  # a file of that name comes first
    with pytest.raises(InputError, match=r"^unknown source 'dollly': expected one of alpaca, dolly"):
        load_rows(f"{finqa}+dollly")
    with pytest.raises(InputError, match=r"gone\.json: no such file"):
        load_rows(f"{finqa}+gone.json")


# ---------------------------------------------------------------------------------------------------------- shortening


def length(row: InstructionRow) -> int:
    return len(row.instruction.split()) + len(row.input.split()) + len(row.output.split())


@given(st.integers(0, 40), st.integers(0, 40), st.integers(8, 90))
def test_the_middle_of_the_text_goes_and_nothing_else(before: int, after: int, width: int):
    record = RECORD | {"pre_text": [f"b{i}" for i in range(before)], "post_text": [f"a{i}" for i in range(after)]}
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
    kept = []
    for text, whole in ((got.before, row.before), (got.after, row.after)):
        head, gap, tail = text.partition(ELLIPSIS)
        assert whole.startswith(head.strip())
        assert whole.endswith(tail.strip()) or not gap
        assert gap or text == whole
        assert 0 <= len(head.split()) - len(tail.split()) <= 1 or not gap
        kept.append(len(head.split()) + len(tail.split()))
    if min(before, after) > min(kept):  # both lose words: then both alike
        assert abs(kept[0] - kept[1]) <= 1
    assert width - length(got) <= 1  # no more than it takes; a gap may be a word more than what it stands for


# -------------------------------------------------------------------------------------------------------------- scores


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
    written = look.format(number)
    assert is_correct(written, str(number))
    assert not is_correct(written, str(number + 1)) or 1900 <= number <= 2100


def test_only_finqa_rows_count():
    finqa = [read_finqa(RECORD, ""), read_finqa(RECORD | {"qa": {"question": "q", "answer": "no"}}, "")]
    silent = read_finqa(RECORD | {"qa": {"question": "q"}}, "")
    given_rows = [InstructionRow("Add.", "", "10%"), *finqa, silent]
    assert score(given_rows, ["10%", "10.2 %", "yes", "10%"]) == {"FinQA exact match (%)": 50, "FinQA rows": 2}
    assert score(given_rows[:1], ["10%"]) == score([silent], ["5"]) == {}
    answers = [Answer(text, (1,), True) for text in ("a", "10%", "no", "")]
    assert instruction_scores(given_rows, answers)["FinQA exact match (%)"] == 100


def test_the_references_of_real_rows_are_right_and_their_neighbors_wrong(shared_data: SharedData):
    path = shared_data("dolly") / "dolly_finqa_val.jsonl"
    asked = [row for row in load_rows(path) if row.input]  # its Dolly rows have lost theirs
    assert len(asked) == 60
    for row in asked:
        (number,) = quantities(row.output)
        other = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), row.output)
        assert is_correct(f"The answer is {row.output}.", row.output), row.output
        assert not is_correct(other, row.output), (number, other)


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("name", "shape", "trained"),
    [
        ("lora-large", (36, 20, 1280), 36 * 8 * (4 * 2 * 1280 + 2 * 5 * 1280) + 8 * (50257 + 1280)),
        ("lora-lima", (24, 16, 1024), 24 * 8 * 4 * 2 * 1024),
        ("dolly-small-lora", (12, 12, 768), 12 * 8 * 4 * 2 * 768),
        ("dolly-finqa-lora", (12, 12, 768), 12 * 8 * 4 * 2 * 768),
    ],
)
def test_what_the_runs_train(name: str, shape: tuple[int, int, int], trained: int):
    run = find(name)
    assert isinstance(run, InstructionRecipe)
    assert fgpt.num_trainable(build_adapters(run, gpt2_shape(*shape))) == trained
    assert f"{trained:,} trained parameters" in (RECIPES[name].__doc__ or "")
    assert (run.max_seq_len, run.adapter.rank, run.adapter.alpha, run.peak_lr) == (1024, 8, 16, 3e-4)


def test_a_mixed_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Pages longer than the rows are trained on whole but for their text; comparison and evaluation see the same."""
    dolly, finqa, out = tmp_path / "dolly.jsonl", tmp_path / "train.json", tmp_path / "runs"
    dolly.write_text(
        "\n".join(json.dumps({"instruction": f"Say {i}.", "context": "", "response": "I do."}) for i in range(6))
    )
    long = RECORD | {"pre_text": ["the fox ran home ."] * 99}
    finqa.write_text(json.dumps([long] * 6 + [RECORD] * 2))
    data = ["--data", f"{dolly}+{finqa}", "--columns.input", "context", "--columns.output", "response"]
    size = [
        "--max-seq-len",
        "192",
        "--steps",
        "2",
        "--warmup-steps",
        "1",
        "--micro-batch-size",
        "1",
        "--num-heldout",
        "6",
        "--compare-prompts",
        "6",
    ]
    base = ["--base", "nano", "--template", "plain", "--max-new-tokens", "6", "--overlong", "error", "--out", str(out)]
    assert main(["train", "dolly-finqa-lora", *base, *data, *size]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "shortened the text of 6 FinQA rows to 192 tokens; their tables are whole" in said
    folder = out / "dolly-finqa-lora"
    found = json.loads((folder / "compare.json").read_text())
    asked = [row["input"] for row in found["answers"] if "|" in row["input"]]
    assert any(ELLIPSIS in page for page in asked)
    assert all("net loss | ( 3 ) | ( 2 )\nsee note 4 ." in page for page in asked)
    assert found["scores"]["base"]["FinQA rows"] == len(asked)
    for name in ("compare.md", "compare.html"):
        assert "FinQA exact match (%)" in (folder / name).read_text()
    assert main(["compare", str(folder), "--prompts", str(finqa), "--num-prompts", "2", "--max-new-tokens", "2"]) == 0
    assert "shortened the text of 2 FinQA prompts to 192 tokens" in " ".join(capsys.readouterr().err.split())
    assert main(["eval", str(folder), "--num-generations", "6"]) == 0
    scores = json.loads((folder / "eval-6-generations.json").read_text())
    assert scores["held out"]["rows left out"] == 0
    assert scores["answers"]["FinQA exact match (%)"] == found["scores"]["tuned"]["FinQA exact match (%)"]
