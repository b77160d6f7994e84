"""The format of a source's rows, decided once by the columns of its first row.

A later row may lack or add columns, as long as it can be read by the same format. In a dataset of several formats each
row has the columns of all, with null in those of the others: so the columns that are there decide, not the filled ones.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

from fgpt.data.conversations import COLUMNS
from fgpt.data.finqa import is_finqa
from fgpt.data.records import column_names
from fgpt.errors import MAX_CHARS, InputError, printable

Kind: TypeAlias = Literal["finqa", "preference", "conversation", "prompt", "instruction", "meaning", "text"]

ASIDE = ("system", "system_prompt", "tools", "functions")
"""Columns that are read beside those of every format of conversations and instructions."""

READ: Mapping[Kind, tuple[str, ...]] = {
    "finqa": ("pre_text", "table", "post_text", "qa", "question", "answer", "exe_ans"),
    "preference": ("chosen", "rejected", "prompt", *COLUMNS),
    "conversation": (*COLUMNS, *ASIDE),
    "prompt": ("prompt", "completion", *ASIDE),
    "instruction": ("history", *ASIDE),
    "meaning": ("mr", "ref", "meaning_representation", "human_reference"),
    "text": ("text",),
}
"""The columns that are read of each kind, if they are there."""

NAMES: Mapping[Kind, str] = {
    "finqa": "FinQA reports",
    "preference": "preference pairs",
    "conversation": "conversations",
    "prompt": "prompts and completions",
    "instruction": "instructions",
    "meaning": "meaning representations and references",
    "text": "raw text",
}

MEANING_COLUMNS = {"mr": "ref", "meaning_representation": "human_reference"}
"""The column of a meaning representation and that of its reference: of the E2E NLG challenge's files, and on the hub.

Source: Novikova et al. 2017, "The E2E Dataset".
"""


FIELDS = (
    "`columns.instruction`, `columns.input` and `columns.output`, or in `columns.prompt` and `columns.completion`, "
    "`columns.messages` or `columns.text`"
)


@dataclass(frozen=True)
class Columns:
    """The names of the columns. `input=None` takes the column "input" if there is one; a name given must exist.

    Names of `messages`, `text`, or `prompt` and `completion` choose that format; only one format can be named.
    """

    instruction: str = "instruction"
    input: str | None = None
    output: str = "output"
    prompt: str | None = None
    """The prompt, a text or messages."""
    completion: str | None = None
    """The completion, a text or messages."""
    messages: str | None = None
    """A list of messages, in any of the formats of conversations."""
    text: str | None = None
    """Raw text, all of which is trained on."""

    def standard_names(self) -> dict[str, str]:
        """The usual name of each column of the format that is chosen by name, and the file's own name for it; empty if
        none is.

        Raises:
            InputError: if columns of two formats are named.
        """
        formats: dict[str, dict[str, str | None]] = {
            "messages": {"messages": self.messages},
            "text": {"text": self.text},
            "prompt": {"prompt": self.prompt, "completion": self.completion},
        }
        chosen = [name for name, names in formats.items() if any(names.values())]
        if (self.instruction, self.input, self.output) != ("instruction", None, "output"):
            chosen.append("instruction")
        if len(chosen) > 1:
            names = " and ".join(f"`columns.{name}`" for name in chosen)
            raise InputError(f"{names} are of different formats: name the columns of one", field="columns")
        if not chosen or chosen == ["instruction"]:
            return {}
        return {usual: name or usual for usual, name in formats[chosen[0]].items()}


class Shape(NamedTuple):
    """What the names of a row's columns say."""

    kinds: tuple[Kind, ...]
    """The formats whose columns are there, the most specific first."""
    is_plain: bool = False
    """An instruction with its output, and nothing else that is read."""


@lru_cache(maxsize=64)
def shape_of(names: tuple[str, ...], columns: Columns) -> Shape:
    """The shape of rows with these columns.

    >>> shape_of(("prompt", "completion", "id"), Columns()).kinds
    ('prompt',)
    """
    present = set(names)
    if is_finqa(dict.fromkeys(names)):
        return Shape(("finqa",))
    if standard := columns.standard_names():
        kind: Kind = "conversation" if "messages" in standard else "text" if "text" in standard else "prompt"
        return Shape((kind,) if present.issuperset(standard.values()) else ())
    has_instruction = columns.instruction in present and columns.output in present
    is_plain = not present.intersection(("history", *ASIDE))
    if has_instruction and columns != Columns():  # what the user names comes first
        return Shape(("instruction",), is_plain)
    kinds: list[Kind] = []
    if {"chosen", "rejected"} <= present:
        kinds.append("preference")
    if present.intersection(COLUMNS):
        kinds.append("conversation")
    if {"prompt", "completion"} <= present:
        kinds.append("prompt")
    if has_instruction:
        kinds.append("instruction")
    if not kinds and columns == Columns() and meaning_columns(names):
        kinds.append("meaning")
    if not kinds and (names == ("text",) or ("text" in present and columns == Columns())):
        kinds.append("text")
    return Shape(tuple(kinds), is_plain and kinds == ["instruction"])


def meaning_columns(names: Iterable[str]) -> tuple[str, str] | None:
    """The columns of a meaning representation and of its reference; None if there are no such two.

    >>> meaning_columns(("id", "mr", "ref"))
    ('mr', 'ref')
    """
    present = set(names)
    return next((pair for pair in MEANING_COLUMNS.items() if present.issuperset(pair)), None)


@dataclass(frozen=True)
class Format:
    """The format of a source's rows."""

    name: str
    kinds: tuple[Kind, ...]
    columns: tuple[str, ...]
    """The columns that are read."""
    ignored: tuple[str, ...]
    """The other columns of the first row."""
    dialect: str | None = None
    """The form of a conversation's messages."""

    def describe(self, num_rows: int) -> str:
        """The format in a few words, with the columns and the number of rows.

        >>> recognize({"prompt": "a", "completion": "b", "id": 1}, Columns(), "row 1").describe(300)
        'prompts and completions (columns prompt, completion; not read: id), 300 rows'
        """
        names = f"column{'s' * (len(self.columns) != 1)} {_join(self.columns)}"
        ignored = f"; not read: {_join(self.ignored)}" if self.ignored else ""
        return f"{self.name} ({names}{ignored}), {num_rows:,} row{'s' * (num_rows != 1)}"


def recognize(record: Mapping[str, Any], columns: Columns, where: str) -> Format:
    """The format of a source whose first row is `record`.

    Raises:
        InputError: if it has the columns of no format, with those that it has and the nearest one.
    """
    kinds = shape_of(tuple(record), columns).kinds
    if not kinds:
        raise missing_column(_first_missing(record, columns), record, where)
    kind, dialect = kinds[0], _dialect(record, columns) if "conversation" in kinds else None
    read = {*READ[kind], *columns.standard_names().values()}
    if kind == "instruction":
        read |= {columns.instruction, columns.input or "input", columns.output}
    used = tuple(str(name) for name in record if name in read)
    ignored = tuple(str(name) for name in record if name not in read)
    name = dialect if kind == "conversation" and dialect else NAMES[kind]
    return Format(name, kinds, used, ignored, dialect)


def check_same(record: Mapping[str, Any], expected: Format, columns: Columns, where: str) -> None:
    """Raises InputError if a row cannot be of the format of the rows before it."""
    kinds = shape_of(tuple(record), columns).kinds
    dialect = _dialect(record, columns) if expected.dialect and "conversation" in kinds else None
    if set(kinds) & set(expected.kinds) and dialect in (None, expected.dialect):
        return
    if not kinds:
        missing = [name for name in expected.columns if name not in record]
        raise missing_column(missing[0] if missing else _first_missing(record, columns), record, where)
    actual = recognize(record, columns, where)
    raise InputError(
        f"{where}: {actual.name} (columns {_join(actual.columns)}), but the rows before are {expected.name} (columns "
        f"{_join(expected.columns)}): expected one format; write each to a file of its own and give both"
    )


def _dialect(record: Mapping[str, Any], columns: Columns) -> str | None:
    """The form of the messages in a row, by the first of them; None if it has none, or writes them as JSON."""
    for name in (columns.messages,) if columns.messages else COLUMNS:
        messages = record.get(name)
        if isinstance(messages, list) and messages:
            first = messages[0]
            if isinstance(first, str):
                return "LIMA conversations"
            if isinstance(first, Mapping):
                return "ShareGPT conversations" if first.get("from") is not None else "conversations of messages"
    return None


def _first_missing(record: Mapping[str, Any], columns: Columns) -> str:
    if columns == Columns():
        for pair in MEANING_COLUMNS.items():
            if len(missing := [name for name in pair if name not in record]) == 1:
                return missing[0]
    names = [*columns.standard_names().values()] or [columns.instruction, columns.output, columns.input or ""]
    return next((name for name in names if name not in record), columns.output)


def missing_column(name: str, record: Mapping[Any, Any], where: str, fields: str = FIELDS) -> InputError:
    """The error for a column that is not there, with those that are and the nearest one. `fields` are the options that
    name columns.
    """
    names = {str(each).lower(): str(each) for each in record if len(str(each)) < MAX_CHARS}
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f" (the nearest is {names[near[0]]!r})" if near else ""
    return InputError(
        f"{where}: no column {name!r}; there are {column_names(record)}: name the columns to use in {fields}{hint}",
        field="columns",
    )


def _join(names: Iterable[str], limit: int = 10) -> str:
    shown = [printable(name) for name in names]
    more = f" and {len(shown) - limit:,} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more
