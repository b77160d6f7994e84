"""Texts in chunks of at most `size` tokens, of which neighbors share at most `overlap` tokens:

    chunk_0 = text[0:stop_0]        chunk_i = text[start_i:stop_i],  start_i <= stop_(i-1)        stop_last = len(text)

so the chunks without what each shares with the one before it are the text. A chunk ends where a paragraph ends, if one
does in its second half; else where a sentence does, or a word. The next one begins with the first sentence, or else
word, of the shared tokens.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from fgpt.errors import InputError


class Chunk(NamedTuple):
    """Characters `start` to `stop` (excluded) of a text."""

    start: int
    stop: int


INSIDE_TOKEN, INSIDE_WORD, WORD, SENTENCE, PARAGRAPH = range(-1, 4)
"""How good a place to cut is before a token, from the worst."""
BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
SENTENCE_END = re.compile(r"""[.!?]["')\]”’]?\s|[。！？]""")


def chunks(text: str, tokens: Sequence[tuple[int, int]], *, size: int, overlap: int) -> list[Chunk]:
    r"""The chunks of a text, none if it has no token.

    Args:
        text: The text.
        tokens: The first character of each token, and the one after its last.
        size: Tokens of a chunk, at most.
        overlap: Tokens that a chunk shares with the one before it, at most.

    Raises:
        InputError: if chunks would share all their tokens, or have none.

    >>> text = "One two. Three four."
    >>> tokens = [(match.start(), match.end()) for match in re.finditer(r"\w+|[.]", text)]
    >>> [text[start:stop] for start, stop in chunks(text, tokens, size=4, overlap=0)]
    ['One two. ', 'Three four.']
    """
    if size < 2 or not 0 <= overlap < size:
        raise InputError(f"chunks of {size} tokens that share {overlap}: expected 2 or more, and an overlap below it")
    if not tokens:
        return []
    starts, grades = [start for start, _ in tokens], _grades(text, tokens)
    parts: list[Chunk] = []
    first = begin = 0
    while first + size < len(tokens):
        end = _cut(grades, first + max(size // 2, overlap) + 1, first + size)
        if end == len(tokens):
            break
        parts.append(Chunk(begin, starts[end]))
        first = _first_shared(grades, end - overlap, end)
        begin = starts[first]
    return [*parts, Chunk(begin, len(text))]


def _grades(text: str, tokens: Sequence[tuple[int, int]]) -> list[int]:
    """How good a place to cut is before each token."""
    grades = [PARAGRAPH]
    for (before, end), (start, _) in itertools.pairwise(tokens):
        gap = text[end:start]
        if start <= before:
            grades.append(INSIDE_TOKEN)
        elif BLANK_LINE.search(gap):
            grades.append(PARAGRAPH)
        elif "\n" in gap or SENTENCE_END.search(text, max(0, end - 2), start):
            grades.append(SENTENCE)
        else:
            grades.append(WORD if gap else INSIDE_WORD)
    return grades


def _cut(grades: Sequence[int], least: int, most: int) -> int:
    """The last of the best places in a range; if a character of several tokens fills it, the first place after it."""
    places = range(most, least - 1, -1)
    best = max(places, key=lambda place: grades[place])
    if grades[best] > INSIDE_TOKEN:
        return best
    return next((place for place in range(most + 1, len(grades)) if grades[place] > INSIDE_TOKEN), len(grades))


def _first_shared(grades: Sequence[int], least: int, end: int) -> int:
    """Where the chunk after `end` begins: the first sentence in the range, else the first word, else any token."""
    for grade in (SENTENCE, WORD, INSIDE_WORD):
        for place in range(least, end):
            if grades[place] >= grade:
                return place
    return end
