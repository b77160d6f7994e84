"""What is left out of a conversation is counted, what cannot be read is refused by its row."""

from pathlib import Path
from typing import Any

import pytest
from builders import SharedData
from builders.conversations import ASSISTANT, SYSTEM, TALK, USER, write_json_rows

import fgpt
from fgpt.data.conversations import (
    EMPTY,
    EMPTY_ANSWER,
    IGNORED,
    REASONING,
    UNANSWERED,
    UNPROMPTED,
    UNWEIGHTED,
    WITHOUT_ANSWER,
)
from fgpt.data.instruction_datasets import load_examples, load_rows
from fgpt.data.pieces import encode_pieces
from fgpt.data.prompt_templates import PLAIN, batch_pieces, encode
from fgpt.data.rows import turns_of
from fgpt.errors import InputError
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

NANO = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)


@pytest.mark.parametrize(
    ("talk", "answers", "left_out"),
    [
        ([USER], 0, {WITHOUT_ANSWER: 1}),
        ([], 0, {WITHOUT_ANSWER: 1}),
        ([*TALK, USER, USER], 2, {UNANSWERED: 2}),
        ([*TALK, USER, {**ASSISTANT, "content": " "}], 2, {EMPTY_ANSWER: 1, UNANSWERED: 1}),
        ([USER, {**ASSISTANT, "content": None}, *TALK], 2, {EMPTY_ANSWER: 1}),
        ([{**SYSTEM, "content": ""}, *TALK], 2, {EMPTY: 1}),
        ([{**USER, "content": None}, ASSISTANT, *TALK], 2, {EMPTY: 1, UNPROMPTED: 1}),
        ([USER, {**ASSISTANT, "weight": 0}, *TALK], 2, {UNWEIGHTED: 1}),
        ([USER, {**ASSISTANT, "loss_weight": 0.0}, *TALK], 2, {UNWEIGHTED: 1}),
        ([USER, {**ASSISTANT, "train": False}, *TALK], 2, {UNWEIGHTED: 1}),
        ([{**USER, "weight": 1}, ASSISTANT], 1, {IGNORED: 1}),
        ([USER, {**ASSISTANT, "reasoning_content": "Well."}], 1, {REASONING: 1}),
    ],
)
def test_what_is_left_out_is_counted(talk: Any, answers: int, left_out: dict[str, int], tmp_path: Path):
    path = write_json_rows(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": talk})
    found = load_examples(path)
    assert len(found.rows) == 1 + (answers > 0)
    assert len(turns_of(found.rows)) == 2 + answers
    assert found.left_out == left_out


def test_a_file_without_an_answer_says_why(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no rows, expected at least one; there are 1 conversations without an"):
        load_rows(write_json_rows(tmp_path / "a.jsonl", {"messages": [USER]}))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}]}, r"line 1, message 1: unknown role 'narrator': expected"),
        ({"messages": [{"role": None, "content": "x"}]}, r"message 1: expected a role and content, or from and value"),
        ({"messages": [{"role": "user"}]}, r"message 1: no content: expected a text with the role 'user'"),
        ({"messages": ["Hi", USER]}, r"line 1: message 1 of 'messages' should be an object, got str"),
        ({"messages": None}, r"line 1: column 'messages' should hold a list of messages, got null"),
        ({"messages": "Hi"}, r"line 1: column 'messages' should hold a list of messages, got text that is not JSON"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, r"message 1: a part of the content is 'image_u"),
        ({"messages": [USER, {**ASSISTANT, "content": True}]}, r"message 2: content should be text, .* got bool"),
        ({"messages": [USER, {**ASSISTANT, "weight": -1}]}, r"message 2: weight is -1, expected 0, a number from"),
        (
            {"messages": [USER, {**ASSISTANT, "weight": float("nan")}]},
            r"message 2: weight is nan, expected 0, a number from",
        ),
        ({"messages": [USER, {**ASSISTANT, "loss_weight": float("inf")}]}, r"message 2: loss_weight is inf, expected"),
        ({"messages": [USER, {**ASSISTANT, "weight": 10**400}]}, r"message 2: weight is 1000.*, expected 0, a number"),
        ({"messages": [USER, {**ASSISTANT, "weight": 1e-320}]}, r"message 2: weight is 1e-320, expected 0, a number"),
        ({"messages": [USER, ASSISTANT], "kto_tag": 0}, r"a row of preference data"),
        ({"messages": [USER, {**ASSISTANT, "train": "no"}]}, r"message 2: train is 'no', expected 0, a number from"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [5]}]}, r"message 2: a tool call should name a function"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"line 1: a row of preference data \(chosen, rejected: DPO"),
        ({"messages": TALK, "label": True}, r"line 1: a row of preference data \(.*: KTO's format\)"),
        ({"prompt": "a", "completion": "b", "label": False}, r"line 1: a row of preference data .*: KTO's format\)"),
        ({"prompt": "a", "completion": "b", "label": "False"}, r"line 1: a row of preference data .*: KTO's format\)"),
        ({"messages": TALK, "conversations": ["a", "b"]}, r"line 1: columns 'messages' and 'conversations' differ"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"line 1: history should hold pairs of question and"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_row(record: Any, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message) as caught:
        load_rows(write_json_rows(tmp_path / "a.jsonl", record))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "conversations", "answers"),
    [
        ("chat/messages_demo.jsonl", 500, 500),
        ("chat/sharegpt_tools_demo.json", 300, 957),  # 746 answers and 211 calls of functions
        ("lima/lima.json", 1029, 1082),
    ],
)
def test_real_conversations(name: str, conversations: int, answers: int, shared_data: SharedData):
    found = load_examples(shared_data(name))
    assert len(found.rows) == conversations
    assert len(turns_of(found.rows)) == answers
    assert not found.left_out
    encoded = encode_pieces([pieces for (pieces,) in batch_pieces(found.rows, PLAIN, NANO)], NANO)
    assert sum(len(example.spans) for example in encoded) == answers
    assert all(encode(row, PLAIN, NANO).prompt_length < len(encode(row, PLAIN, NANO).tokens) for row in found.rows[:40])


@pytest.mark.parametrize("name", ["preference/dpo_en_demo.json", "preference/kto_en_demo.json"])
def test_real_preferences_are_refused(name: str, shared_data: SharedData):
    path = shared_data(name)
    with pytest.raises(InputError, match=r"row 1: a row of preference data"):
        load_rows(path)
