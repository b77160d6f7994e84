"""Regular expressions from a user or a file, matched within a second or refused.

Python's own engine can take forever over a few characters, such as `(a+)+b`, and has no time limit. The `regex` library
has one, and reads the same language. What it expands before it matches, `a{9}` to nine times a, is bounded here.
"""

import math
import re
import time
from collections.abc import Iterable

from fgpt.errors import InputError, one_line, short_repr

SECONDS = 1.0
"""Time limit for all names, and for all patterns of a file, together."""
MAX_CHARS = 10_000
"""Length of a pattern."""
MAX_EXPANDED_CHARS = 1_000_000
"""Length of a pattern with its counted repetitions expanded."""


def matching(pattern: str, names: Iterable[str], what: str = "selector", end: float | None = None) -> list[str]:
    r"""The names that a pattern matches in full.

    Args:
        pattern: A regular expression.
        names: The names.
        what: What the error calls the pattern.
        end: A time limit on the monotonic clock, which several patterns may share; by default a second from now.

    Raises:
        InputError: if the pattern is not a regular expression, is too large, or takes too long.

    >>> matching(r"blocks\.\d+\.attn\.q", ["blocks.0.attn.q", "blocks.0.attn.k"])
    ['blocks.0.attn.q']
    """
    import regex  # here, to keep `import fgpt` fast

    _check_size(pattern, what)
    end = time.monotonic() + SECONDS if end is None else end
    try:
        compiled = regex.compile(pattern)
        matched = [name for name in names if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 1e-3))]
        if time.monotonic() > end:
            raise TimeoutError
    except TimeoutError:
        raise InputError(
            f"{what} {short_repr(pattern)} takes longer than {SECONDS:g} s to match: expected a simpler pattern, "
            "without repetitions inside repetitions"
        ) from None
    except (regex.error, RecursionError, OverflowError, MemoryError) as err:
        raise InputError(f"{what} {short_repr(pattern)} is not a regular expression: {one_line(err)}") from None
    return matched


def _check_size(pattern: str, what: str) -> None:
    if len(pattern) > MAX_CHARS:
        raise InputError(
            f"{what} {short_repr(pattern)} has {len(pattern):,} characters; expected at most {MAX_CHARS:,}"
        )
    counts = [re.sub(r"\D", "", part, flags=re.ASCII) for part in re.findall(r"[{,][^{},]*", pattern)]
    too_many = any(len(count) > 6 for count in counts)
    if too_many or len(pattern) * math.prod(int(n) or 1 for n in counts if n) > MAX_EXPANDED_CHARS:
        raise InputError(f"{what} {short_repr(pattern)} repeats too often: expected smaller counts in its braces")
