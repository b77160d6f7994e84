"""Passages in prompts: the same text in every kind of row, as many as fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.data.conversations import Message
from fgpt.data.finqa import FinQA
from fgpt.data.prompt_templates import encode_prompt, template
from fgpt.data.rows import InstructionRow, TextRow, Turn, conversation_row
from fgpt.retrieval.index import Passage
from fgpt.retrieval.passages import augment, augment_to_fit, question_of

PASSAGES = [Passage("a.md", 0, 0, "Rain fell."), Passage("b.pdf", 3, 7, "Snow {fell}.")]
TEXT = "[1] a.md\nRain fell.\n\n[2] b.pdf, page 3\nSnow {fell}."
CHAT = (
    Message("system", "Be brief."),
    Message("user", "Hi."),
    Message("assistant", "Hello."),
    Message("user", "When?"),
)


def test_passages_stand_before_the_input_with_their_sources():
    assert augment(InstructionRow("When?", "", "Now."), PASSAGES) == InstructionRow("When?", TEXT, "Now.")
    assert augment(InstructionRow("When?", "In the table."), PASSAGES).input == f"{TEXT}\n\nIn the table."
    row = InstructionRow("When?")
    assert augment(row, []) is row


def test_of_a_conversation_they_stand_after_the_last_question():
    turn = augment(Turn("When?", "", "Now.", CHAT), PASSAGES)
    assert turn.messages == (*CHAT[:-1], Message("user", f"When?\n\n{TEXT}"))
    row = augment(conversation_row((*CHAT, Message("assistant", "Now."))), PASSAGES)
    assert row.messages == (*turn.messages, Message("assistant", "Now."))


@pytest.mark.parametrize("name", ["tulu", "none"])
def test_a_question_by_itself_is_one_prompt_in_either_kind_of_row(name: str):
    tokenizer = fgpt.tokenizer("nano")
    rows = [InstructionRow("When?"), Turn("When?", messages=(Message("user", "When?"),))]
    first, second = (encode_prompt(augment(row, PASSAGES), template(name), tokenizer) for row in rows)
    assert first == second
    assert "Snow {fell}." in tokenizer.decode(first)


def test_the_question_is_what_is_asked_last():
    assert question_of(InstructionRow("When?", "In March?")) == "When?\n\nIn March?"
    assert question_of(Turn("When?", messages=CHAT)) == "When?"
    assert question_of(TextRow(output="Once.")) is None
    assert question_of(FinQA("How much?", "page", "1")) is None
    assert question_of(Turn("", messages=(Message("system", "Go."),))) is None


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(0, 120))
def test_the_last_passages_are_dropped_until_the_row_fits(lengths: list[int], max_length: int):
    passages = [Passage(f"{i}.md", 0, 0, "x" * length) for i, length in enumerate(lengths)]
    row = InstructionRow("When?")

    def length(row: InstructionRow) -> int:
        return len(row.instruction) + len(row.input)

    augmented = augment_to_fit(row, passages, length=length, max_length=max_length)
    count = len(augmented.passages)
    assert augmented.passages == passages[:count]
    assert augmented.num_dropped == len(passages) - count
    assert augmented.row == augment(row, passages[:count])
    assert count == 0 or length(augmented.row) <= max_length
    assert count == len(passages) or length(augment(row, passages[: count + 1])) > max_length
