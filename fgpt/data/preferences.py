"""Preference data: pairs of a better and a worse answer (DPO, ORPO), and answers judged good or bad (KTO). A pair can
be read as two judged answers.

{"prompt": .., "chosen": .., "rejected": ..}                      texts, or lists of messages
{"messages" or "conversations": .., "chosen": .., "rejected": ..}
{"chosen": [..], "rejected": [..]}                                whole conversations with the same beginning
{"prompt": .., "chosen": [..], "rejected": [..], "messages": ..}  UltraFeedback's: messages are the chosen ones again
{"prompt": .., "completion": .., "label": true}                   KTO's; texts, or lists of messages
{"messages" or "conversations": .., "label": true}                the answer is the last message
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from fgpt.data.conversations import COLUMNS, Message, Role, read_conversation
from fgpt.data.formats import ASIDE, Columns, Format, missing_column
from fgpt.data.hub_datasets import HubDataset
from fgpt.data.records import column_text, is_missing
from fgpt.data.source_syntax import Source
from fgpt.data.sources import open_source
from fgpt.errors import InputError, short_repr

R = TypeVar("R")
Messages: TypeAlias = tuple[Message, ...]

LABELS = ("label", "kto_tag")
"""The usual names of the column that judges an answer."""
FIELDS = (
    "`columns.prompt`, `columns.messages`, `columns.chosen`, `columns.rejected`, `columns.completion` and "
    "`columns.label`"
)


@dataclass(frozen=True)
class PreferenceColumns(Columns):
    """The names of the columns. `prompt`, `completion` and `messages` are as those of instructions: a name given must
    exist. `messages` are the conversation before the answers, or the one that ends with the judged answer.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    label: str | None = None
    """Whether the answer is good; None takes "label" or "kto_tag"."""

    def check(self) -> None:
        """Raises InputError for columns that preferences do not have."""
        for name in ("instruction", "input", "output", "text"):
            if getattr(self, name) != getattr(Columns(), name):
                raise InputError(f"`columns.{name}` is of instruction data: {FIELDS} name those of preferences")


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
    return read_preferences(source, columns).rows


def load_judgments(source: str | Path | Source, columns: PreferenceColumns | None = None) -> list[Judgment]:
    """The judged answers of a source; see `load_preferences`. Of a source of pairs, both answers of each.

    Raises:
        InputError: if the source cannot be read, a row is not a judged answer, or all answers have the same label.
    """
    rows = read_judgments(source, columns).rows
    check_labels(rows, str(source))
    return rows


@dataclass(frozen=True)
class PreferenceRows(Generic[R]):
    """The rows of a source."""

    rows: list[R]
    format: str
    """Their format in one line: the source, its columns and the number of rows."""


def read_preferences(
    source: str | Path | Source, columns: PreferenceColumns | None = None
) -> PreferenceRows[Preference]:
    """`load_preferences`, and the format."""
    columns = columns or PreferenceColumns()
    pairs = _Layout("preference pairs", (columns.chosen, columns.rejected), lambda *row: (_preference(*row),))
    return _read(source, columns, lambda first: pairs)


def read_judgments(source: str | Path | Source, columns: PreferenceColumns | None = None) -> PreferenceRows[Judgment]:
    """`load_judgments`, and the format; of one source the labels may all be the same."""
    columns = columns or PreferenceColumns()
    labels = (columns.label,) if columns.label else LABELS
    completion = columns.completion or "completion"
    judged = _Layout("judged answers", (completion, *labels), lambda *row: (_judgment(*row),))
    pair = (columns.chosen, columns.rejected)
    pairs = _Layout("preference pairs, each a good and a bad answer", pair, _judged_pair)

    def layout(first: Mapping[str, Any]) -> _Layout[Judgment]:
        named = columns.label or columns.completion or any(name in first for name in labels)
        return pairs if not named and all(name in first for name in pair) else judged

    return _read(source, columns, layout)


def check_labels(rows: Sequence[Judgment], source: str) -> None:
    """Raises InputError if all answers have the same label."""
    if len({row.label for row in rows}) == 1:
        label = str(rows[0].label).lower()
        raise InputError(f"{source}: all {len(rows):,} labels are {label}: expected both good and bad answers")


@dataclass(frozen=True)
class _Layout(Generic[R]):
    """A format: its name, its columns besides prompt and conversation, and the rows of a record."""

    name: str
    names: Sequence[str]
    rows: Callable[[Mapping[str, Any], PreferenceColumns, str], Sequence[R]]


def _read(
    source: str | Path | Source, columns: PreferenceColumns, layout: Callable[[Mapping[str, Any]], _Layout[R]]
) -> PreferenceRows[R]:
    """The rows, of the layout that the first record has."""
    columns.check()
    records, _ = open_source(source if isinstance(source, Source) else str(source), dict[str, HubDataset]())
    rows: list[R] = []
    first: Mapping[str, Any] = {}
    form: _Layout[R] | None = None
    count = 0
    for where, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{source}, {where}: expected an object of columns, got {type(record).__name__}")
        first = first or record
        form = form or layout(first)
        rows += form.rows(record, columns, f"{source}, {where}")
        count += 1
    if form is None:
        raise InputError(f"{source}: it holds no rows, expected at least one")
    conversation = (columns.messages,) if columns.messages else COLUMNS
    used = {*form.names, columns.prompt or "prompt", *conversation, *ASIDE}
    read_columns, others = (tuple(str(x) for x in first if (x in used) == is_read) for is_read in (True, False))
    return PreferenceRows(rows, f"{source}: {Format(form.name, (), read_columns, others).describe(count)}")


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
        raise missing_column("prompt", record, where, FIELDS)
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


def _judged_pair(record: Mapping[str, Any], columns: PreferenceColumns, where: str) -> tuple[Judgment, Judgment]:
    pair = _preference(record, columns, where)
    return Judgment(pair.prompt, pair.chosen, True, where), Judgment(pair.prompt, pair.rejected, False, where)


def _judgment(record: Mapping[str, Any], columns: PreferenceColumns, where: str) -> Judgment:
    name = columns.label or next((name for name in LABELS if name in record), LABELS[0])
    if name not in record:
        raise missing_column(name, record, where, FIELDS)
    label = _label(record[name], name, where)
    completion = columns.completion or "completion"
    if columns.completion and completion not in record:
        raise missing_column(completion, record, where, FIELDS)
    if completion in record and not is_missing(record[completion]):
        prompt = _prompt(record, columns, where)
        if prompt is None:
            raise missing_column("prompt", record, where, FIELDS)
        answer = _messages(record[completion], completion, "assistant", where)
        name = completion
    else:
        messages = _conversation(record, columns, where)
        if messages is None:
            raise missing_column(completion, record, where, FIELDS)
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
    name = columns.prompt or "prompt"
    if columns.prompt and name not in record:
        raise missing_column(name, record, where, FIELDS)
    conversation = None if columns.prompt else _conversation(record, columns, where)
    if conversation is not None and (columns.messages or conversation not in answers):
        return conversation
    if is_missing(record.get(name)):
        return None
    return _messages(record[name], name, "user", where, _aside(record))


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
    if not all(message.content.strip() for message in answer if message.role == "assistant"):
        raise InputError(f"{where}: {name} is empty: expected an answer; fix the row, or remove it")
    if answer[-1].role != "assistant":
        role = answer[-1].role
        raise InputError(f"{where}: {name} ends with a message of the {role}: expected an answer; fix the row")
    if weights := [message.weight for message in answer if message.role == "assistant" and message.weight != 1]:
        raise InputError(
            f"{where}: {name} has a loss weight of {weights[0]:g}: a whole answer is better or worse, leave weights out"
        )
