"""Conversations: one example each, in every format, with a turn for each answer."""

import json
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet
import pytest
from builders.conversations import SYSTEM, TALK, messages_row, write_json_rows

import fgpt
from fgpt.data.conversations import (
    UNPROMPTED,
    Message,
)
from fgpt.data.instruction_datasets import Columns, load_examples, load_rows
from fgpt.data.prompt_templates import PLAIN, InstructionRow, Turn, encode_prompt
from fgpt.data.rows import turns_of
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

NANO = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)
ALPACA_ROW = {"instruction": "Good night.", "output": "Bonne nuit."}
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def examples_of(path: Path) -> list[tuple[tuple[Message, ...], str]]:
    """(what precedes an answer, the answer) for each turn of the one row that a file's one conversation gives."""
    found = []
    (conversation,) = load_rows(path)
    for row in turns_of([conversation]):
        before = row.messages if isinstance(row, Turn) else (Message("user", row.instruction),)
        found.append((before, row.output))
    return found


def sharegpt(talk: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"from": SHAREGPT[each["role"]], "value": each["content"]} for each in talk]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [SYSTEM, *TALK]},
        {"messages": [{**SYSTEM, "role": "developer"}, *TALK]},
        {"messages": json.dumps([SYSTEM, *TALK])},
        {"messages": [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in [SYSTEM, *TALK]]},
        {"conversations": sharegpt([SYSTEM, *TALK])},
        {"conversations": sharegpt(TALK), "system": "Answer in French.", "tools": "[]"},
        {"conversations": [each["content"] for each in TALK], "system": "Answer in French."},
        {"prompt": [SYSTEM, TALK[0]], "completion": TALK[1:]},
        ALPACA_ROW | {"history": [["Hello.", "Bonjour."]], "system": "Answer in French."},
        ALPACA_ROW | {"history": [["Hello.", "Bonjour."]], "system_prompt": "Answer in French.", "system": ""},
        ALPACA_ROW | {"messages": [SYSTEM, *TALK]},
        {"conversations": None, "instruction": None, "output": None, "prompt": None, "messages": [SYSTEM, *TALK]},
        {"messages": [SYSTEM, *TALK], "conversations": sharegpt([SYSTEM, *TALK])},
        [SYSTEM, *TALK],
    ],
)
def test_every_format_gives_one_conversation_with_a_turn_for_each_answer(record: Any, tmp_path: Path):
    assert examples_of(write_json_rows(tmp_path / "a.jsonl", record)) == [
        (messages_row(SYSTEM, TALK[0]), "Bonjour."),
        (messages_row(SYSTEM, *TALK[:3]), "Bonne nuit."),
    ]


def test_a_parquet_file_of_messages(tmp_path: Path):
    """Its structs have every key, null where a message has none."""
    talk = [{"role": "user", "content": "Two?", "weight": None}, {"role": "assistant", "content": "2", "weight": 1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk}]), tmp_path / "a.parquet")
    assert load_rows(tmp_path / "a.parquet") == [InstructionRow("Two?", "", "2")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TALK[:2]},
        {"conversations": ["Hello.", "Bonjour."]},
        {"prompt": "Hello.", "completion": "Bonjour."},
        {"prompt": [TALK[0]], "completion": [TALK[1]]},
        {"instruction": "Hello.", "output": "Bonjour.", "history": []},
        {"instruction": "Hello.", "output": "Bonjour.", "history": "A column of another meaning."},
        {"instruction": "Hello.", "output": "Bonjour.", "conversation": "A column of another meaning."},
        {"instruction": "Hello.", "output": "Bonjour.", "messages": None, "conversations": [], "conversation": 5},
        {"messages": None, "conversations": float("nan"), "prompt": "Hello.", "completion": "Bonjour."},
    ],
)
def test_a_question_and_its_answer_are_a_plain_row(record: Any, tmp_path: Path):
    assert load_rows(write_json_rows(tmp_path / "a.jsonl", record)) == [InstructionRow("Hello.", "", "Bonjour.")]


def test_calls_of_tools_and_their_results(tmp_path: Path):
    call = {"name": "add", "arguments": {"a": 2}}
    openai = {"role": "assistant", "content": None, "tool_calls": [{"function": {**call, "arguments": '{"a": 2}'}}]}
    question, result, answer = ({"role": "user", "content": "2 + 2?"}, {"role": "tool", "content": "4"}, "Four.")
    tools = [{"name": "add"}]
    expected = [
        (("system", 'Tools:\n[{"name": "add"}]'), ("user", "2 + 2?")),
        (("assistant", '{"name": "add", "arguments": {"a": 2}}'), ("tool", "4")),
    ]
    first, second = (
        tuple(Message(*x) for x in cast(Any, expected[0])),
        tuple(Message(*x) for x in cast(Any, expected[1])),
    )
    for record in (
        {"messages": [question, openai, result, {"role": "assistant", "content": answer}], "tools": tools},
        {
            "conversations": [
                {"from": "human", "value": "2 + 2?"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": answer},
            ],
            "tools": json.dumps(tools),
        },
    ):
        found = examples_of(write_json_rows(tmp_path / "a.jsonl", record))
        assert found == [(first, second[0].content), (first + second, answer)]


@pytest.mark.parametrize("name", ["tools", "functions"])
@pytest.mark.parametrize("record", [{"messages": TALK[:2]}, {"instruction": "Hello.", "output": "Bonjour."}])
def test_what_an_assistant_may_call_is_read_beside_every_format(name: str, record: dict[str, Any], tmp_path: Path):
    path = write_json_rows(tmp_path / "a.jsonl", record | {name: [{"name": "add"}]})
    before = (Message("system", 'Tools:\n[{"name": "add"}]'), Message("user", "Hello."))
    assert examples_of(path) == [(before, "Bonjour.")]


def test_named_columns_come_first(tmp_path: Path):
    path = write_json_rows(tmp_path / "a.jsonl", {"ask": "a", "say": "b", "messages": TALK})
    assert load_rows(path, Columns("ask", None, "say")) == [InstructionRow("a", "", "b")]


def test_two_messages_of_a_user_both_stay(tmp_path: Path):
    talk = [{"role": "user", "content": "It rains."}, {"role": "user", "content": "In French?"}]
    path = write_json_rows(tmp_path / "a.jsonl", {"messages": [*talk, {"role": "assistant", "content": "Il pleut."}]})
    assert examples_of(path) == [(messages_row(*talk), "Il pleut.")]
    row = load_rows(path)[0]
    assert NANO.decode(list(encode_prompt(row, PLAIN, NANO))) == "Instruction: It rains.\n\nIn French?\n\nResponse:\n"


def test_an_assistant_that_opens_is_context(tmp_path: Path):
    greeting = {"role": "assistant", "content": "How can I help?"}
    path = write_json_rows(tmp_path / "a.jsonl", {"messages": [greeting, *TALK[:2]]})
    context = (Message("assistant", "How can I help?", 0.0), *messages_row(TALK[0]))
    assert examples_of(path) == [(context, "Bonjour.")]
    assert load_examples(path).left_out == {UNPROMPTED: 1}
