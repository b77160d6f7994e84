"""Regular expressions from a user or a file, matched within a second or refused.

Python's own engine can take forever over a few characters, such as `(a+)+b`, and has no time limit. The `regex` library
has one, and reads the same language. What it expands before it matches, `a{9}` to nine times a, is bounded here.
"""

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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


def first_matches(paths: Sequence[str], patterns: Mapping[str, Any], what: str = "selector") -> dict[str, str]:
    """The first of `patterns` that matches each path in full; paths that none matches are left out.

    >>> first_matches(["q/a", "q/b"], {".*/b": 16.0})
    {'q/b': '.*/b'}
    """
    first: dict[str, str] = {}
    for pattern in patterns:
        for path in matching(pattern, paths, what):
            first.setdefault(path, pattern)
    return first


def check_patterns(paths: Sequence[str], patterns: Mapping[str, Any], what: str) -> None:
    """Raises InputError for a pattern that matches no path: it would change nothing, in silence."""
    for pattern in patterns:
        if not matching(pattern, paths, what):
            examples = ", ".join(paths[:4])
            raise InputError(
                f"{what} {short_repr(pattern)} matches none of {examples}{' ..' if len(paths) > 4 else ''}"
            )


def by_pattern(paths: Sequence[str], patterns: Mapping[str, Any], default: Any, what: str) -> dict[str, Any]:
    """For each path the value of the first of `patterns` that matches it in full, else `default`.

    Args:
        paths: Such as those of the layers that are adapted.
        patterns: Values by regular expressions.
        default: The value of a path that none matches.
        what: What the error calls the mapping.

    Raises:
        InputError: for a pattern that matches no path, and as `matching` does.

    >>> by_pattern(["q", "k"], {"q": 16}, 8, "rank_pattern")
    {'q': 16, 'k': 8}
    """
    check_patterns(paths, patterns, what)
    first = first_matches(paths, patterns, what)
    return {path: patterns[first[path]] if path in first else default for path in paths}


def _check_size(pattern: str, what: str) -> None:
    if len(pattern) > MAX_CHARS:
        raise InputError(
            f"{what} {short_repr(pattern)} has {len(pattern):,} characters; expected at most {MAX_CHARS:,}"
        )
    counts = [re.sub(r"\D", "", part, flags=re.ASCII) for part in re.findall(r"[{,][^{},]*", pattern)]
    too_many = any(len(count) > 6 for count in counts)
    if too_many or len(pattern) * math.prod(int(n) or 1 for n in counts if n) > MAX_EXPANDED_CHARS:
        raise InputError(f"{what} {short_repr(pattern)} repeats too often: expected smaller counts in its braces")
