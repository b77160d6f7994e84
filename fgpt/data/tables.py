"""Rows of text tables: comma-separated (RFC 4180), and tab-separated with or without quoting."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fgpt.data.text_files import open_text, strip_boms
from fgpt.errors import InputError, printable

MAX_FIELD_LENGTH = 2**31 - 1
"""Characters of a field. Python's own limit is 131,072, which a long document exceeds."""


def read_csv(path: Path, **dialect: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table, each as (the line that it ends in, its fields by column name). Every field is text.

    Args:
        path: The file.
        dialect: Options of `csv.reader`, such as `delimiter`.

    Raises:
        InputError: if a row has more or fewer fields than the header, or two columns have the same name.
    """
    csv.field_size_limit(MAX_FIELD_LENGTH)
    with open_text(path, newline="") as lines:
        reader = csv.reader(strip_boms(lines), strict=True, **dialect)
        try:
            header = next(reader, [])
            _check_header(path, header)
            for fields in reader:
                if not fields:  # a blank line
                    continue
                if len(fields) != len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields, but the header names {len(header)}: "
                        "quote the fields that hold commas or newlines"
                    )
                yield f"line {reader.line_num}", dict(zip(header, fields, strict=True))
        except csv.Error as err:
            raise InputError(f"{path}, line {reader.line_num}: not CSV ({err}): fix that line") from None


def _check_header(path: Path, header: list[str]) -> None:
    repeated = [name for name, times in Counter(header).items() if times > 1]
    if repeated:
        name = printable(repeated[0]) or "(no name)"
        raise InputError(f"{path}: two columns are called {name!r}: give each a name of its own")


def read_tsv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a tab-separated file, as `read_csv` gives them.

    There are two conventions for .tsv. pandas, R and spreadsheets quote a field that needs it, and double the quotation
    marks in it. Others, such as GLUE's files, quote nothing: a quotation mark is an ordinary character. A file is read
    as quoted if all of it is what a quoting writer writes, and as plain otherwise.
    """
    quoting = csv.QUOTE_MINIMAL if is_quoted(path) else csv.QUOTE_NONE
    yield from read_csv(path, delimiter="\t", quoting=quoting)


def is_quoted(path: Path) -> bool:
    """Whether a tab-separated file is what a quoting writer writes.

    Either every field of its header is quoted, and every row can be read with the same number of fields; or each row,
    when read and written again with quotes for the fields that need them, is the same text. A single quotation mark, or
    quotes around a field that does not need them, are neither.
    """
    csv.field_size_limit(MAX_FIELD_LENGTH)
    has_quotes = False
    with open_text(path, newline="") as lines:
        row_lines: list[str] = []
        reader = csv.reader(_copy_lines(strip_boms(lines), row_lines), delimiter="\t", strict=True)
        num_columns, all_quoted = 0, False
        try:
            for row in reader:
                text = "".join(row_lines).rstrip("\r\n")
                row_lines.clear()
                if not num_columns:
                    num_columns, all_quoted = len(row), text == _format_row(row, csv.QUOTE_ALL)
                if '"' not in text:  # the same in both conventions
                    continue
                has_quotes = True
                if len(row) != num_columns or not (all_quoted or text == _format_row(row, csv.QUOTE_MINIMAL)):
                    return False
        except csv.Error:
            return False
    return has_quotes


def _copy_lines(lines: Iterable[str], copies: list[str]) -> Iterator[str]:
    """`lines`, each also appended to `copies`."""
    for line in lines:
        copies.append(line)
        yield line


def _format_row(row: list[str], quoting: Any) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter="\t", quoting=quoting, lineterminator="\r\n").writerow(row)
    return text.getvalue().removesuffix("\r\n")
