"""The documents of a text file."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fgpt.data.text_files import open_text, read_errors
from fgpt.errors import InputError
from fgpt.tokenizers.tiktoken_bpe import END

TITLE = re.compile(r"^ \n(?= = [^=\n]+ = \n \n)", re.MULTILINE)
"""The beginning of a WikiText article: its title is between blank lines, with one = where a section has more."""


def read(path: Path) -> list[str]:
    """The documents of a text file, decompressed if its name ends in .gz, .bz2, .xz or .zst: separated by
    <|endoftext|>, else the articles of WikiText, else the file as one document.

    Raises InputError if the file cannot be read, is not UTF-8, or holds no text.
    """
    try:
        with read_errors(path), open_text(path) as file:
            text = file.read()
    except InputError as err:
        raise InputError(f"{path}: expected a text in UTF-8, its documents separated by {END}: {err}") from None
    parts = [part.strip() for part in text.split(END)] if END in text else articles(text)
    texts = [part for part in parts if part.strip()]
    if not texts:
        raise InputError(f"{path}: holds no text")
    return texts


def articles(text: str) -> list[str]:
    """WikiText's articles, whose concatenation is `text`; any other text is one article."""
    starts = [match.start() for match in TITLE.finditer(text)]
    edges = [0, *(start for start in starts if start > 0), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def text_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The documents of `read` as records with the column "text"."""
    yield from ((f"document {number}", {"text": text}) for number, text in enumerate(read(path), 1))
