"""Numbers, durations and nested results as short text."""

from collections.abc import Mapping
from typing import Any


def number(x: float) -> str:
    """In few characters: 12,000 or 0.0025 or 2.5e-6."""
    if x == 0:
        return "0"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.4g}" if abs(x) >= 1e-3 else f"{x:.2g}".replace("e-0", "e-")


def percent(share: float) -> str:
    """A share with one decimal, or a small one with one digit: 6.8 % or 0.02 %."""
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.1g} %"


def count(number: int, noun: str) -> str:
    """How many there are of something.

    >>> count(1, "run"), count(1200, "run")
    ('1 run', '1,200 runs')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def score(x: float | None) -> str:
    """With three decimals, so that a column of them can be compared."""
    return "–" if x is None else f"{x:,.3f}"


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s or 12 s."""
    rounded = round(seconds)
    if rounded >= 3600:
        return f"{rounded // 3600} h {rounded % 3600 // 60:02} min"
    return f"{rounded // 60} min {rounded % 60:02} s" if rounded >= 60 else f"{seconds:.0f} s"


def table_rows(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The names and values of nested results as the rows of a table."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        label = prefix + name.replace("_", " ")
        if isinstance(value, Mapping):
            rows += table_rows(value, f"{label}: ")
        else:
            rows.append((label, _text(value)))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value)
