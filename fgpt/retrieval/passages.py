"""How passages enter a prompt: numbered, with their sources, before the input of an instruction.

    input = [1] notes.md
            Rain fell in March.

            [2] report.pdf, page 3
            ..

Of a conversation they stand after the last question, as a chat template puts an input. Training and generation use this
function alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from fgpt.data.conversations import Message
from fgpt.data.finqa import FinQA
from fgpt.data.rows import ConversationRow, InstructionRow, TextRow, Turn
from fgpt.retrieval.index import Passage

R = TypeVar("R", bound=InstructionRow)


class AugmentedRow(NamedTuple):
    """A row with as many passages as have room."""

    row: InstructionRow
    passages: list[Passage]
    num_dropped: int


def question_of(row: InstructionRow) -> str | None:
    """What passages are searched for: the instruction with its input, or the last question of a conversation. None if
    there is no question, and for a question about a page, which is its document.

    >>> question_of(InstructionRow("When did it rain?"))
    'When did it rain?'
    """
    if isinstance(row, TextRow | FinQA):
        return None
    if isinstance(row, Turn | ConversationRow):
        last = _last_question(row.messages)
        return None if last is None else row.messages[last].content
    return f"{row.instruction}\n\n{row.input}" if row.input.strip() else row.instruction


def augment(row: R, passages: Sequence[Passage]) -> R:
    r"""The row with passages in its prompt; the row itself if there are none.

    Args:
        row: One that has a question.
        passages: In their order.

    >>> augment(InstructionRow("When did it rain?"), [Passage("notes.md", 0, 0, "Rain fell in March.")]).input
    '[1] notes.md\nRain fell in March.'
    """
    if not passages:
        return row
    text = "\n\n".join(f"[{i}] {passage.where}\n{passage.text}" for i, passage in enumerate(passages, 1))
    if not isinstance(row, Turn | ConversationRow):
        return replace(row, input=f"{text}\n\n{row.input}" if row.input.strip() else text)
    last = _last_question(row.messages)
    assert last is not None
    before, question, after = row.messages[:last], row.messages[last], row.messages[last + 1 :]
    return replace(row, messages=(*before, replace(question, content=f"{question.content}\n\n{text}"), *after))


def augment_to_fit(
    row: InstructionRow, passages: Sequence[Passage], *, length: Callable[[InstructionRow], int], max_length: int
) -> AugmentedRow:
    """`augment` by the passages that have room: the last ones are dropped first.

    Args:
        row: One that has a question.
        passages: The best first.
        length: Tokens of a row.
        max_length: Of the row with its passages. A row that is longer by itself gets none.
    """
    for count in range(len(passages), 0, -1):
        augmented = augment(row, passages[:count])
        if length(augmented) <= max_length:
            return AugmentedRow(augmented, list(passages[:count]), len(passages) - count)
    return AugmentedRow(row, [], len(passages))


def _last_question(messages: Sequence[Message]) -> int | None:
    """The index of the user's last message."""
    return next((i for i in range(len(messages) - 1, -1, -1) if messages[i].role == "user"), None)
