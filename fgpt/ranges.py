"""Ranges of numeric fields: declared once, in the type of a dataclass's field, and checked from there.

    batch_size: PositiveInt = 8
    top_p: Annotated[float, Range(above=0, most=1)] | None = None

`Annotated` changes nothing for a type checker, nor for a parser of the field.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias, get_args, get_origin, get_type_hints

from fgpt.errors import InputError, short_repr

LARGEST = 2**31 - 1
"""Bound of an integer without another one: far above any sensible value, and small enough for every index."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a field may have. Infinity and NaN are in no range."""

    least: int | float | None = None
    above: int | float | None = None
    most: int | float | None = None
    below: int | float | None = None
    fraction_or_integer: bool = False
    """Whether numbers from 1 on must be integers."""

    def holds(self, x: int | float) -> bool:
        if isinstance(x, float) and not math.isfinite(x):
            return False
        if self.fraction_or_integer and isinstance(x, float) and x >= 1:
            return False
        high_enough = (self.least is None or x >= self.least) and (self.above is None or x > self.above)
        low_enough = (self.most is None or x <= self.most) and (self.below is None or x < self.below)
        return high_enough and low_enough

    def describe(self, x: int | float) -> str:
        """The range in words, for a number x that is not in it."""
        words: list[str] = []
        if self.least is not None:
            words.append(f"{self.least:,} or more")
        if self.above is not None:
            words.append(f"a number above {self.above:,}")
        if self.most is not None and (self.most != LARGEST or x > LARGEST):  # the default bound says nothing
            words.append(f"at most {self.most:,}")
        if self.below is not None:
            words.append(f"below {self.below:,}")
        if self.fraction_or_integer:
            words.append("an integer, or a fraction below 1")
        return ", ".join(words) or "a finite number"


PositiveInt: TypeAlias = Annotated[int, Range(least=1, most=LARGEST)]
BatchSize: TypeAlias = Annotated[int, Range(least=1, most=2**16)]
"""Number of examples, or of other things, that are in memory at once: a larger one would run out of memory."""
NonNegativeInt: TypeAlias = Annotated[int, Range(least=0, most=LARGEST)]
PositiveFloat: TypeAlias = Annotated[float, Range(above=0)]
NonNegativeFloat: TypeAlias = Annotated[float, Range(least=0)]
Fraction: TypeAlias = Annotated[float, Range(least=0, below=1)]
CountOrFraction: TypeAlias = Annotated[int | float, Range(least=0, most=LARGEST, fraction_or_integer=True)]
"""A number of examples, or if it is below 1 a fraction of them."""
Seed: TypeAlias = Annotated[int, Range(least=-(2**63), most=2**64 - 1)]
"""The range of `torch.Generator.manual_seed`."""


def check(options: Any, prefix: str = "") -> None:
    """Raises InputError for the first number in a dataclass, or in a nested one, that is out of its field's range. The
    message begins with `prefix` and the field's name, as an option's name begins with dashes.
    """
    for name, hint in hints(type(options)).items():
        value = getattr(options, name)
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{name}." if not is_flat(hint) else prefix)
            continue
        for allowed in ranges(hint):
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, int | float) and not allowed.holds(x):
                    option = f"{prefix}{name}".replace("_", "-") if prefix else name
                    raise InputError(f"{option} is {short_repr(x)}: expected {allowed.describe(x)}")


def hints(cls: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields, with their `Annotated` metadata."""
    types = get_type_hints(cls, include_extras=True)
    return {field.name: types[field.name] for field in dataclasses.fields(cls)}


def ranges(hint: Any) -> Iterator[Range]:
    """The ranges in a type, also within a union or a tuple."""
    if get_origin(hint) is Annotated:
        yield from (x for x in hint.__metadata__ if isinstance(x, Range))
    for part in get_args(hint):
        yield from ranges(part)


def is_flat(hint: Any) -> bool:
    """Whether the options of a nested dataclass are named without its name before theirs."""
    return get_origin(hint) is Annotated
