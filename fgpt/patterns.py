"""Regular expressions that a user types or a file holds: what they match is known within a second, or refused.

Python's own engine can take for ever over a few characters, `(a+)+b`, and has no limit of time. That of `regex` has
one, and reads the same language. What it would write out before it matches, `a{9}` as nine times a, is bounded here.
"""

import math
import re
import time
from collections.abc import Iterable

from fgpt.errors import InputError, one_line, shown

SECONDS = 1.0
"""For all the names, and all the patterns of a file, together."""
LONGEST, LARGEST = 10_000, 1_000_000
"""Characters of a pattern, as it stands and with its counted repetitions written out."""


def matching(pattern: str, names: Iterable[str], what: str = "selector", end: float | None = None) -> list[str]:
    """Those of `names` that `pattern` matches in full.

    `end`, on the monotonic clock, is a limit that several patterns share; else a second is given.

    Raises InputError, in which the pattern is called `what`, where it is no regular expression, is too large, or takes
    too long.
    """
    import regex  # here, because importing fgpt must stay fast

    _check_size(pattern, what)
    end = time.monotonic() + SECONDS if end is None else end
    try:
        compiled = regex.compile(pattern)
        found = [name for name in names if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 1e-3))]
        if time.monotonic() > end:
            raise TimeoutError
    except TimeoutError:
        raise InputError(
            f"{what} {shown(pattern)} takes longer than {SECONDS:g} s to match: expected a simpler pattern, without "
            "repetitions inside repetitions"
        ) from None
    except (regex.error, RecursionError, OverflowError, MemoryError) as err:
        raise InputError(f"{what} {shown(pattern)} is not a regular expression: {one_line(err)}") from None
    return found


def _check_size(pattern: str, what: str) -> None:
    if len(pattern) > LONGEST:
        raise InputError(f"{what} {shown(pattern)} has {len(pattern):,} characters; expected at most {LONGEST:,}")
    counts = [re.sub(r"\D", "", part, flags=re.ASCII) for part in re.findall(r"[{,][^{},]*", pattern)]
    if any(len(count) > 6 for count in counts) or len(pattern) * math.prod(int(n) or 1 for n in counts if n) > LARGEST:
        raise InputError(f"{what} {shown(pattern)} repeats too often: expected smaller counts in its braces")
