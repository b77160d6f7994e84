"""Parts of a dataset in the syntax of the library `datasets`: train, train[:1000], train[:10%]+test[-50:]."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from fgpt.errors import InputError, short_repr

T = TypeVar("T")

BOUNDS = r"(?P<start>-?\d{1,15}%?)?:(?P<stop>-?\d{1,15}%?)?"
PART = re.compile(rf"(?P<name>\w+(?:[.-]\w+)*)(?:\[{BOUNDS}\])?")
CAP = re.compile(BOUNDS)


@dataclass(frozen=True)
class SplitPart:
    """Rows `start` to `stop` (excluded) of a split; negative numbers count from its end."""

    name: str | None = None
    """The split; None is the default one."""
    start: int | None = None
    stop: int | None = None
    percent: bool = False
    """The bounds are percentages of the split's rows, rounded to whole rows."""

    @property
    def needs_count(self) -> bool:
        """Whether the bounds depend on the number of rows."""
        return self.percent or min(self.start or 0, self.stop or 0) < 0

    def bounds(self, num_rows: int) -> tuple[int, int]:
        """The first row and the one after the last, of `num_rows`.

        >>> SplitPart("train", -10, None, percent=True).bounds(200)
        (180, 200)
        """
        limits = []
        for bound, default in ((self.start, 0), (self.stop, num_rows)):
            row = default if bound is None else round(bound * num_rows / 100) if self.percent else bound
            limits.append(min(max(row + num_rows, 0) if row < 0 else row, num_rows))
        return limits[0], max(limits)

    def select(self, rows: Callable[[], Iterator[T]]) -> Iterator[T]:
        """The rows of the part. `rows` begins anew at each call; bounds that depend on their number take two passes."""
        if (self.start, self.stop) == (None, None):
            return rows()
        if not self.needs_count:
            return itertools.islice(rows(), self.start, self.stop)
        return itertools.islice(rows(), *self.bounds(sum(1 for _ in rows())))


def parse_split(text: str) -> tuple[SplitPart, ...]:
    """The parts that a text names; a slice alone is one of the default split.

    Raises:
        InputError: for any other text.

    >>> parse_split(":1000")
    (SplitPart(name=None, start=None, stop=1000, percent=False),)
    >>> [part.name for part in parse_split("train[:10%]+test")]
    ['train', 'test']
    """
    parts = []
    for part in text.split("+"):
        match = PART.fullmatch(part.strip()) or CAP.fullmatch(part.strip())
        if match is None:
            raise _error(text)
        bounds = [match["start"], match["stop"]]
        units = {bound.endswith("%") for bound in bounds if bound}
        if len(units) > 1:
            raise _error(text)
        numbers = [int(bound.rstrip("%")) if bound else None for bound in bounds]
        percent = units == {True}
        if percent and any(abs(number or 0) > 100 for number in numbers):
            raise _error(text)
        parts.append(SplitPart(match.groupdict().get("name"), numbers[0], numbers[1], percent))
    return tuple(parts)


def _error(text: str) -> InputError:
    return InputError(f"split {short_repr(text)}: expected a split such as train, train[:1000], train[:10%] or :1000")
