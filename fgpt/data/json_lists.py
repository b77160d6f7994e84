"""The items of a list in a JSON file, read one by one: a list of 300,000 objects would take a gigabyte."""

import io
import json
from collections.abc import Iterator
from typing import Any

CHUNK = 1 << 20
"""Characters that are read at a time; of a longer item twice as many each time."""
_WHITESPACE = " \t\n\r"


class NotAListError(ValueError):
    """The text is not one list in JSON, or Python cannot represent it."""


def list_items(file: io.TextIOBase) -> Iterator[Any]:
    """The items of a list.

    Args:
        file: It holds one list in JSON.

    Raises:
        NotAListError: where the text is anything else. The items before it were given by then.

    >>> import io
    >>> list(list_items(io.StringIO('[1, {"a": [2]}]')))
    [1, {'a': [2]}]
    """
    decoder = json.JSONDecoder()
    text, at, chunk = "", 0, CHUNK

    def more() -> bool:
        nonlocal text, at
        added = file.read(chunk)
        text, at = text[at:] + added, 0
        return bool(added)

    def next_character() -> str:
        """The next character that is not whitespace; it is not consumed. Empty at the end."""
        nonlocal at
        while True:
            while at < len(text) and text[at] in _WHITESPACE:
                at += 1
            if at < len(text):
                return text[at]
            if not more():
                return ""

    if next_character() != "[":
        raise NotAListError
    at += 1
    is_first = True
    while (character := next_character()) != "]":
        if not is_first:
            if character != ",":
                raise NotAListError
            at += 1
            next_character()
        item: Any = None
        while True:
            try:
                item, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError):
                end = None
            if end is not None and end < len(text) and text[end] not in ".eE":  # a number at the end may go on
                break
            chunk *= 2
            if not more():
                raise NotAListError
        at, chunk, is_first = end, CHUNK, False
        yield item
    at += 1
    if next_character():
        raise NotAListError
