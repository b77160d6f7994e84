"""Rows of text tables: comma-separated as RFC 4180 has them, tab-separated with quoting or without."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fgpt.data.text_files import open_text, without_marks
from fgpt.errors import InputError, printable

LONGEST_FIELD = 2**31 - 1
"""Characters of a field. Python's own limit is 131,072, which a long document passes."""


def read_csv(path: Path, **dialect: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """(the line a row ends in, the row by the names of the header).

    Raises InputError for a row with more fields or fewer than the header, and for two columns of one name.
    """
    csv.field_size_limit(LONGEST_FIELD)
    with open_text(path, newline="") as lines:
        reader = csv.reader(without_marks(lines), strict=True, **dialect)
        try:
            header = next(reader, [])
            if twice := [name for name, times in Counter(header).items() if times > 1]:
                name = printable(twice[0]) or "(no name)"
                raise InputError(f"{path}: two columns are called {name!r}: give each a name of its own")
            for values in reader:
                if not values:  # a blank line
                    continue
                if len(values) != len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(values)} fields, but the header names {len(header)}: "
                        "quote the fields that hold commas or newlines"
                    )
                yield f"line {reader.line_num}", dict(zip(header, values, strict=True))
        except csv.Error as err:
            raise InputError(f"{path}, line {reader.line_num}: not CSV ({err}): mend it there") from None


def read_tsv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a tab-separated file, as `read_csv` gives them.

    Two customs share the name .tsv. pandas, R and spreadsheets quote a field where it needs it, and double the
    quotation marks in it. Others, as GLUE's files, quote nothing: a quotation mark is only itself. A file is read as
    quoted where all of it is what a quoting writer writes, and as plain otherwise.
    """
    quoting = csv.QUOTE_MINIMAL if is_quoted(path) else csv.QUOTE_NONE
    yield from read_csv(path, delimiter="\t", quoting=quoting)


def is_quoted(path: Path) -> bool:
    """Whether a tab-separated file is what a quoting writer writes.

    Either its header is quoted throughout, and every row can be read with as many fields; or each row, read and written
    again with quotes where a field needs them, is the same text. A lone quotation mark, or quotes around a field that
    needs none, are neither.
    """
    csv.field_size_limit(LONGEST_FIELD)
    quotes = False
    with open_text(path, newline="") as lines:
        taken: list[str] = []
        reader = csv.reader(_recorded(without_marks(lines), taken), delimiter="\t", strict=True)
        width, all_quoted = 0, False
        try:
            for row in reader:
                text = "".join(taken).rstrip("\r\n")
                taken.clear()
                if not width:
                    width, all_quoted = len(row), text == _written(row, csv.QUOTE_ALL)
                if '"' not in text:  # is the same either way
                    continue
                quotes = True
                if len(row) != width or not (all_quoted or text == _written(row, csv.QUOTE_MINIMAL)):
                    return False
        except csv.Error:
            return False
    return quotes


def _recorded(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    """The lines, each put into `taken` as it is read."""
    for line in lines:
        taken.append(line)
        yield line


def _written(row: list[str], quoting: Any) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter="\t", quoting=quoting, lineterminator="\r\n").writerow(row)
    return text.getvalue().removesuffix("\r\n")
