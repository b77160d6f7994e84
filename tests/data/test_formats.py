"""The format of a source: named once by its columns, the same for all its rows; columns by other names."""

import copy
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from builders import SharedData
from builders.conversations import ASSISTANT, TALK, USER, write_json_rows
from builders.finqa import FINQA_RECORD
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.data.examples import Example, Span, split_text
from fgpt.data.instruction_datasets import Columns, RowReader, load_examples, load_rows
from fgpt.data.prompt_templates import ALPACA, CHAT, InstructionRow, TextRow, encode
from fgpt.errors import InputError
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

NANO = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            {"instruction": "a", "input": "", "output": "b", "text": "c"},
            "instructions (columns instruction, input, output; not read: text), 1 row",
        ),
        ({"prompt": "a", "completion": "b"}, "prompts and completions (columns prompt, completion), 1 row"),
        ({"messages": TALK, "id": 5}, "conversations of messages (column messages; not read: id), 1 row"),
        ({"conversations": SHAREGPT, "tools": "[]"}, "ShareGPT conversations (columns conversations, tools), 1 row"),
        ({"conversations": ["a", "b"]}, "LIMA conversations (column conversations), 1 row"),
        ({"text": "a", "url": "b"}, "raw text (column text; not read: url), 1 row"),
        (FINQA_RECORD | {"id": 1}, "FinQA reports (columns pre_text, table, post_text, qa; not read: id), 1 row"),
    ],
)  # fmt: skip
def test_the_format_is_named_in_one_line(record: Any, line: str, tmp_path: Path):
    path = write_json_rows(tmp_path / "a.jsonl", record)
    said = load_examples(path).format
    assert said.startswith(f"{path}: {line}")
    assert "\n" not in said


def test_the_formats_of_real_files(shared_data: SharedData):
    path = shared_data("chat/sharegpt_tools_demo.json")
    assert load_examples(path).format == f"{path}: ShareGPT conversations (columns conversations, tools), 300 rows"


ROWS: dict[str, Any] = {
    "instructions": {"instruction": "a", "output": "b"},
    "prompts": {"prompt": "a", "completion": "b"},
    "messages": {"messages": TALK},
    "ShareGPT": {"conversations": SHAREGPT},
    "LIMA": {"conversations": ["a", "b"]},
    "text": {"text": "a"},
    "FinQA": FINQA_RECORD,
}


@given(st.lists(st.sampled_from(list(ROWS)), min_size=2, max_size=6))
def test_a_file_of_two_formats_is_refused_at_its_first_other_row(names: list[str]):
    reader, left_out, other = RowReader(Columns()), Counter[str](), [name != names[0] for name in names]
    for i, name in enumerate(names):
        if other[i]:
            with pytest.raises(InputError, match=rf"^row {i}: .* \(columns .*\), but the rows before are ") as caught:
                reader(ROWS[name], f"row {i}", left_out)
            assert "\n" not in str(caught.value)
            return
        assert reader(ROWS[name], f"row {i}", left_out)
        assert ForkingPickler.dumps(reader)  # a worker process can have it
        reader = copy.deepcopy(reader)


def test_rows_of_one_format_may_lack_and_add_columns(tmp_path: Path):
    records = [
        {"instruction": "a", "output": "b"},
        {"output": "d", "instruction": "c", "input": "i", "id": 1},
        {"instruction": "e", "output": "f", "history": [], "messages": None},
    ]
    assert [row.output for row in load_rows(write_json_rows(tmp_path / "a.jsonl", *records))] == ["b", "d", "f"]
    with pytest.raises(
        InputError,
        match=r"line 2: no column 'output'; there are 'instruction', 'outptu': .* \(the nearest is 'outptu'\)",
    ):
        load_rows(write_json_rows(tmp_path / "a.jsonl", records[0], {"instruction": "a", "outptu": "b"}))


def test_a_dataset_of_several_formats_has_null_in_the_columns_of_the_others(tmp_path: Path):
    records = [
        {"messages": TALK[:2], "instruction": None, "output": None, "prompt": None, "completion": None},
        {"messages": None, "instruction": "a", "output": "b", "prompt": None, "completion": None},
        {"messages": [], "instruction": None, "output": None, "prompt": "c", "completion": "d"},
    ]
    rows = load_rows(write_json_rows(tmp_path / "a.jsonl", *records))
    assert [row.output for row in rows] == ["Bonjour.", "b", "d"]


# ------------------------------------------------------------------------------------------------------ columns by name


@pytest.mark.parametrize(
    ("columns", "record", "row"),
    [
        (Columns(prompt="q", completion="a"), {"q": "x", "a": "y"}, InstructionRow("x", "", "y")),
        (Columns(prompt="q"), {"q": [USER], "completion": [ASSISTANT]}, InstructionRow("No?", "", "Yes.")),
        (Columns(messages="chat"), {"chat": [USER, ASSISTANT], "messages": 1}, InstructionRow("No?", "", "Yes.")),
        (Columns(messages="chat"), {"chat": ["x", "y"], "output": 1}, InstructionRow("x", "", "y")),
        (Columns(text="body"), {"body": "x", "text": "z", "messages": []}, TextRow(output="x")),
        (Columns(instruction="text", output="label"), {"text": "x", "label": 5}, InstructionRow("x", "", "5")),
    ],
)
def test_columns_by_other_names(columns: Columns, record: Any, row: InstructionRow, tmp_path: Path):
    assert load_rows(write_json_rows(tmp_path / "a.jsonl", record), columns) == [row]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(messages="chats"), r"line 1: no column 'chats'; there are 'chat', .*\(the nearest is 'chat'\)$"),
        (Columns(text="Body"), r"line 1: no column 'Body'; .*\(the nearest is 'body'\)$"),
        (Columns(prompt="chat"), r"line 1: no column 'completion'; there are 'chat', 'body'"),
        (Columns(prompt="chat", text="body"), r"^`columns\.text` and `columns\.prompt` are of different formats"),
        (Columns(instruction="a", messages="chat"), r"^`columns\.messages` and `columns\.instruction` are of "),
    ],
)  # fmt: skip
def test_columns_that_are_not_there(columns: Columns, message: str, tmp_path: Path):
    path = write_json_rows(tmp_path / "a.jsonl", {"chat": TALK, "body": "x"})
    with pytest.raises(InputError, match=message) as caught:
        load_rows(path, columns)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- raw text


@given(st.text(min_size=1).filter(str.strip))
def test_every_token_of_a_text_is_trained_on(text: str):
    row = TextRow(output=text)
    assert encode(row, CHAT, NANO) == encode(row, ALPACA, NANO)
    example = encode(row, ALPACA, NANO)
    assert NANO.decode(example.tokens[:-1]) == text
    assert example.tokens[-1] == NANO.eos_token_id
    assert example.spans == (Span(0, len(example.tokens)),)


def test_empty_texts_are_counted(tmp_path: Path):
    path = write_json_rows(tmp_path / "a.jsonl", {"text": "a"}, {"text": " "}, {"text": None})
    found = load_examples(path)
    assert found.rows == [TextRow(output="a")]
    assert found.left_out == {"empty texts": 2}
    with pytest.raises(InputError, match=r"line 1: column 'text' should hold text, got list"):
        load_rows(write_json_rows(tmp_path / "a.jsonl", {"text": ["a"]}))
    with pytest.raises(InputError, match=r"it holds no rows, expected at least one; there are 1 empty texts"):
        load_rows(write_json_rows(tmp_path / "a.jsonl", {"text": ""}))


@given(st.integers(1, 40), st.integers(2, 12))
def test_parts_of_a_long_text_predict_each_token_once(length: int, max_seq_len: int):
    whole = Example(tuple(range(length)), (Span(0, length),))
    parts = split_text(whole, max_seq_len)
    predicted = [t for part in parts for start, end, _ in part.spans for t in part.tokens[max(1, start) : end]]
    assert predicted == list(range(1, length))
    assert all(1 < len(part.tokens) <= max_seq_len for part in parts) or length == 1
    assert sum(part.num_loss_tokens for part in parts) == whole.num_loss_tokens


def test_other_examples_are_not_split():
    for example in (Example.completion(tuple(range(20)), 3), Example.classification(tuple(range(20)), 1)):
        assert split_text(example, 5) == [example]
