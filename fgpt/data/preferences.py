"""Preference data: pairs of a better and a worse answer (DPO, ORPO), and answers judged good or bad (KTO).

{"prompt": .., "chosen": .., "rejected": ..}                      texts, or lists of messages
{"messages" or "conversations": .., "chosen": .., "rejected": ..}
{"chosen": [..], "rejected": [..]}                                whole conversations with the same beginning
{"prompt": .., "chosen": [..], "rejected": [..], "messages": ..}  UltraFeedback's: messages are the chosen ones again
{"prompt": .., "completion": .., "label": true}                   KTO's; texts, or lists of messages
{"messages" or "conversations": .., "label": true}                the answer is the last message
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from fgpt.data.conversations import COLUMNS, Message, Role, read_conversation
from fgpt.data.formats import ASIDE, missing_column
from fgpt.data.hub_datasets import HubDataset
from fgpt.data.records import column_text, is_missing
from fgpt.data.source_syntax import Source
from fgpt.data.sources import open_source
from fgpt.errors import InputError, short_repr

R = TypeVar("R")
Messages: TypeAlias = tuple[Message, ...]

LABELS = ("label", "kto_tag")
"""The usual names of the column that judges an answer."""
FIELDS = "`columns.prompt`, `columns.chosen`, `columns.rejected`, `columns.completion`, `columns.label`"


@dataclass(frozen=True)
class PreferenceColumns:
    """The names of the columns. A name given must exist."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    messages: str | None = None
    """The conversation before the answers, or the one that ends with the judged answer; None takes the usual names."""
    label: str | None = None
    """Whether the answer is good; None takes "label" or "kto_tag"."""


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse answer, each of which may be several messages."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    where: str = ""
    """The position in the source."""


@dataclass(frozen=True)
class Judgment:
    """A prompt and an answer that is good, `label` True, or bad."""

    messages: Messages
    answer: Messages
    label: bool
    where: str = ""
    """The position in the source."""


def load_preferences(source: str | Path | Source, columns: PreferenceColumns | None = None) -> list[Preference]:
    """The pairs of a source.

    Args:
        source: Any source; see `fgpt.data.source_syntax`.
        columns: The names of its columns.

    Raises:
        InputError: if the source cannot be read, holds no pairs, or a row is none: without a prompt, with an empty
            answer, or with the same answer twice.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
    >>> _ = path.write_text('{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}')
    >>> [(pair.prompt[0].content, pair.chosen[0].content) for pair in load_preferences(path)]
    [('2 + 2?', '4')]
    """
    return list(_read(source, columns or PreferenceColumns(), _preference))


def load_judgments(source: str | Path | Source, columns: PreferenceColumns | None = None) -> list[Judgment]:
    """The judged answers of a source; see `load_preferences`.

    Raises:
        InputError: if the source cannot be read, a row is not a judged answer, or all answers have the same label.
    """
    rows = list(_read(source, columns or PreferenceColumns(), _judgment))
    if len({row.label for row in rows}) == 1:
        label = str(rows[0].label).lower()
        raise InputError(f"{source}: all {len(rows):,} labels are {label}: expected both good and bad answers")
    return rows


def _read(
    source: str | Path | Source,
    columns: PreferenceColumns,
    read: Callable[[Mapping[str, Any], PreferenceColumns, str], R],
) -> Iterator[R]:
    records, _ = open_source(source if isinstance(source, Source) else str(source), dict[str, HubDataset]())
    is_empty = True
    for where, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{source}, {where}: expected an object of columns, got {type(record).__name__}")
        yield read(record, columns, f"{source}, {where}")
        is_empty = False
    if is_empty:
        raise InputError(f"{source}: it holds no rows, expected at least one")


def _preference(record: Mapping[str, Any], columns: PreferenceColumns, where: str) -> Preference:
    for name in (columns.chosen, columns.rejected):
        if name not in record:
            raise missing_column(name, record, where, FIELDS)
    sides = [_messages(record[name], name, "assistant", where) for name in (columns.chosen, columns.rejected)]
    prompt = _prompt(record, columns, where, sides)
    beginning = tuple(a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(*sides)))
    while beginning and beginning[-1].role == "assistant":
        beginning = beginning[:-1]
    if prompt is None and not beginning:
        raise missing_column(columns.prompt, record, where, FIELDS)
    if prompt is None or beginning[-len(prompt) :] == prompt:  # the answers are whole conversations
        prompt = beginning
    after_system = prompt[1:] if prompt and prompt[0].role == "system" else prompt  # without what another column says
    for start in (prompt, after_system):
        if start and all(side[: len(start)] == start for side in sides):
            sides = [side[len(start) :] for side in sides]
            break
    _check_prompt(prompt, where)
    for name, side in zip((columns.chosen, columns.rejected), sides, strict=True):
        _check_answer(side, name, where)
    chosen, rejected = sides
    if chosen == rejected:
        raise InputError(f"{where}: {columns.chosen} and {columns.rejected} are the same answer: remove the row")
    return Preference(prompt, chosen, rejected, where)


def _judgment(record: Mapping[str, Any], columns: PreferenceColumns, where: str) -> Judgment:
    name = columns.label or next((name for name in LABELS if name in record), LABELS[0])
    if name not in record:
        raise missing_column(name, record, where, FIELDS)
    label = _label(record[name], name, where)
    if columns.completion in record and not is_missing(record[columns.completion]):
        prompt = _prompt(record, columns, where)
        if prompt is None:
            raise missing_column(columns.prompt, record, where, FIELDS)
        answer = _messages(record[columns.completion], columns.completion, "assistant", where)
        name = columns.completion
    else:
        messages = _conversation(record, columns, where)
        if messages is None:
            raise missing_column(columns.completion, record, where, FIELDS)
        num_answers = len(list(takewhile(lambda message: message.role == "assistant", reversed(messages))))
        prompt, answer = messages[: len(messages) - num_answers], messages[len(messages) - num_answers :]
        name = "the end of the conversation"
    _check_prompt(prompt, where)
    _check_answer(answer, name, where)
    return Judgment(prompt, answer, label, where)


def _label(value: Any, name: str, where: str) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    label = words.get(str(value).strip().lower()) if isinstance(value, str | bool | int) else None
    if label is None:
        raise InputError(f"{where}: column {name!r} is {short_repr(value)}, expected true or false")
    return label


def _prompt(
    record: Mapping[str, Any], columns: PreferenceColumns, where: str, answers: Sequence[Messages] = ()
) -> Messages | None:
    """The prompt in its own column, or the conversation before the answers; None if there is neither. A conversation
    that is one of the whole `answers` is that answer once more, as in UltraFeedback, and no prompt.
    """
    conversation = _conversation(record, columns, where)
    if conversation is not None and (columns.messages or conversation not in answers):
        return conversation
    if is_missing(record.get(columns.prompt)):
        return None
    return _messages(record[columns.prompt], columns.prompt, "user", where, _aside(record))


def _conversation(record: Mapping[str, Any], columns: PreferenceColumns, where: str) -> Messages | None:
    if columns.messages is not None and columns.messages not in record:
        raise missing_column(columns.messages, record, where, "`columns.messages`")
    names = (columns.messages,) if columns.messages else COLUMNS
    name = next((name for name in names if record.get(name)), None)
    return None if name is None else _messages(record[name], name, "user", where, _aside(record))


def _aside(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ASIDE if name in record}


def _messages(value: Any, name: str, role: Role, where: str, aside: Mapping[str, Any] | None = None) -> Messages:
    """The messages of a column that holds a text of `role`, a message, or a list of messages."""
    value = [value] if isinstance(value, Mapping) else value
    is_text = not isinstance(value, list) and not (isinstance(value, str) and name in COLUMNS)
    if is_text:
        value = [{"role": role, "content": "" if is_missing(value) else column_text(value, name, where)}]
    conversation = read_conversation({"messages": value, **(aside or {})}, f"{where}, column {name!r}")
    return () if conversation is None else conversation.messages


def _check_prompt(prompt: Messages, where: str) -> None:
    if not any(message.content.strip() for message in prompt if message.role in ("user", "tool")):
        raise InputError(f"{where}: the prompt is empty: expected a message of the user; fix the row, or remove it")
    if prompt[-1].role == "assistant":
        raise InputError(f"{where}: the prompt ends with an answer of the assistant: expected one of the user; fix it")


def _check_answer(answer: Messages, name: str, where: str) -> None:
    if not answer or all(message.role != "assistant" for message in answer):
        raise InputError(f"{where}: {name} holds no answer of the assistant: fix the row, or remove it")
    if answer[0].role != "assistant":
        raise InputError(
            f"{where}: {name} begins with a message of the {answer[0].role}: expected an answer, or "
            "the row's own prompt before it"
        )
    if not any(message.content.strip() for message in answer if message.role == "assistant"):
        raise InputError(f"{where}: {name} is empty: expected an answer; fix the row, or remove it")
