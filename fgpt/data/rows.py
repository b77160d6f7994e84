"""The rows of instruction tuning, as text: an instruction with its answer, a conversation, or one turn of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fgpt.data.conversations import Message, as_text


@dataclass(frozen=True)
class InstructionRow:
    """An instruction, the input to apply it to (may be empty), and its answer (empty if it is to be generated)."""

    instruction: str
    input: str = ""
    output: str = ""


@dataclass(frozen=True)
class TextRow(InstructionRow):
    """Raw text, in `output`: there is no prompt, and every token is trained on, whatever the template."""

    instruction: str = ""


@dataclass(frozen=True)
class Turn(InstructionRow):
    """An answer in a conversation. The prompt is built from `messages` alone; `instruction`, the message before the
    answer, and `input`, the conversation before that, are for people to read. `output` is the answer.

    A row of a single instruction is the turn whose only message is the user's.
    """

    messages: tuple[Message, ...] = ()
    """All messages before the answer."""
    weight: float = 1.0
    """The weight of each token of the answer in the loss."""
    conversation: str = ""
    """Position of the conversation in its source, the same for all its turns."""


@dataclass(frozen=True)
class ConversationRow(InstructionRow):
    """A conversation: one example, in which each of the assistant's messages with a weight is trained on. The last
    message is such an answer; `instruction`, `input` and `output` are those of its turn.
    """

    messages: tuple[Message, ...] = ()
    conversation: str = ""
    """Position of the conversation in its source."""

    def turns(self) -> list[Turn]:
        """A turn for each answer that is trained on."""
        turns: list[Turn] = []
        for i, answer in enumerate(self.messages):
            if answer.role == "assistant" and answer.weight > 0:
                *earlier, last = self.messages[:i]
                question = last.content if last.role == "user" else as_text([last])
                context = self.messages[:i]
                turns.append(
                    Turn(question, as_text(earlier), answer.content, context, answer.weight, self.conversation)
                )
        return turns

    def last_turn(self) -> "ConversationRow":
        """The conversation with its last answer alone trained on."""
        *earlier, last = self.messages
        context = [replace(each, weight=0.0) if each.role == "assistant" else each for each in earlier]
        return replace(self, messages=(*context, last))


def conversation_row(messages: Sequence[Message], where: str = "") -> ConversationRow:
    """The row of messages up to the last answer that is trained on.

    >>> chat = (Message("user", "Hi."), Message("assistant", "Hello."), Message("user", "Bye."))
    >>> conversation_row(chat[:2]).output
    'Hello.'
    """
    row = ConversationRow("", messages=tuple(messages), conversation=where)
    last = row.turns()[-1]
    return replace(row, instruction=last.instruction, input=last.input, output=last.output)


def turns_of(rows: Iterable[InstructionRow]) -> list[InstructionRow]:
    """The rows, with a turn for each answer of a conversation in its place: what a model is asked, and compared on."""
    turns: list[InstructionRow] = []
    for row in rows:
        turns += row.turns() if isinstance(row, ConversationRow) else [row]
    return turns


def turn_number(row: InstructionRow) -> int:
    """The number of the answer in its conversation, from 1.

    >>> chat = (Message("user", "Hi."), Message("assistant", "Hello."), Message("user", "Bye."))
    >>> turn_number(Turn("Bye.", messages=chat))
    2
    """
    return 1 + sum(message.role == "assistant" for message in row.messages) if isinstance(row, Turn) else 1


def last_turns(rows: Iterable[InstructionRow]) -> tuple[list[InstructionRow], int]:
    """The rows, of each conversation with its last answer alone trained on, and how many answers became context."""
    last: list[InstructionRow] = []
    count = 0
    for row in rows:
        if isinstance(row, ConversationRow):
            count += len(row.turns()) - 1
            row = row.last_turn()
        last.append(row)
    return last, count
