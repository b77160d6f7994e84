"""Tables of a page, as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Column(NamedTuple):
    """The head of a column."""

    name: str
    is_numeric: bool = True
    """Numbers stand at the right."""
    color: str = ""
    """A color variable of the style, of a dot before the name."""
    note: str = ""


class Cell(NamedTuple):
    """What a cell shows."""

    text: str
    value: float | None = None
    """What the column is sorted by; None sorts by the text, a number if it is one."""
    note: str = ""
    href: str = ""
    color: str = ""
    """A color variable of the style, of a dot before the text or of the bar."""
    bar: float | None = None
    """The length of a bar after the text, from 0 to 1."""
    is_best: bool = False
    is_changed: bool = False


@dataclass(frozen=True)
class Table:
    """Columns and rows; the first cell of a row is its head."""

    label: str
    """What it holds, for who does not see it."""
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    is_sortable: bool = True
    """By a click on the head of a column, if there are several rows."""


def text_column(name: str) -> Column:
    """A column of texts, which stand at the left.

    >>> text_column("state").is_numeric
    False
    """
    return Column(name, is_numeric=False)
