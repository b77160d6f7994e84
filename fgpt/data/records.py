"""Records of data files (JSON, JSON lines, CSV, TSV, Parquet, Arrow, text), and the values of their columns."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from fgpt.data.arrow_files import read_arrow, read_parquet
from fgpt.data.documents import text_records
from fgpt.data.json_lists import NotAListError, list_items
from fgpt.data.tables import read_csv, read_tsv
from fgpt.data.text_files import OPENERS, file_format, open_text, read_errors, strip_boms
from fgpt.errors import InputError

Record: TypeAlias = tuple[str, Any]
"""(its position in the source, for error messages; its columns)."""

Readers: TypeAlias = Mapping[str, Callable[[Path], Iterator[Record]]]
"""The function that reads a file, by the file's extension."""

MAX_COLUMNS_SHOWN = 20
"""Columns that an error message names."""


def read_records(path: Path, extra_readers: Readers | None = None) -> Iterator[Record]:
    r"""The records of a file, read according to its extension.

    Args:
        path: The file; text formats may be compressed (.jsonl.gz).
        extra_readers: Readers of further extensions, or in place of the usual ones.

    Raises:
        InputError: if the format is unknown, the file is empty, or it cannot be read.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "data.csv"
    >>> _ = path.write_text("text,label\nNA,007\n")
    >>> list(read_records(path))
    [('line 2', {'text': 'NA', 'label': '007'})]
    """
    readers = {**_READERS, **(extra_readers or {})}
    extension = file_format(path)
    if extension not in readers or (extension in (".parquet", ".arrow") and path.suffix.lower() in OPENERS):
        raise InputError(
            f"{path}: cannot tell its format; expected a name that ends in {', '.join(readers)}, or for a "
            f"compressed text file in one of these and {', '.join(OPENERS)}"
        )
    with read_errors(path):
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty, expected rows")
        yield from readers[extension](path)


def read_json(path: Path, field: str | None = None) -> Iterator[Record]:
    """The objects of a JSON list, or of the list in `field` of the one object. Raises InputError for anything else."""
    number = 0
    try:
        with open_text(path) as file:
            for number, record in enumerate(list_items(file) if field is None else [], 1):
                yield f"row {number}", record
        if field is None:
            return
    except NotAListError:
        pass
    # The whole text says what is wrong with it, or holds the field.
    try:
        with open_text(path) as file:
            records = _parse_json(file.read(), str(path))
    except json.JSONDecodeError as err:
        hint = "if it holds one object per line, name it .jsonl" if err.msg == "Extra data" else "fix that line"
        raise InputError(f"{path}, line {err.lineno}: not JSON ({err.msg}, column {err.colno}): {hint}") from None
    if field is not None:
        records = records.get(field) if isinstance(records, dict) else records
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a list of objects, got {type(records).__name__}: wrap the rows in [ ]")
    yield from ((f"row {i}", record) for i, record in enumerate(records[number:], number + 1))


def read_json_or_lines(path: Path) -> Iterator[Record]:
    """The objects of a JSON list, or one per line, as datasets on the hub name both .json."""
    with open_text(path) as lines:
        first = next((line for line in strip_boms(lines) if line.strip()), "")
    try:
        has_lines = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        has_lines = False
    yield from read_jsonl(path) if has_lines else read_json(path)


def read_jsonl(path: Path) -> Iterator[Record]:
    """The objects of a file with one per line. Raises InputError for anything else."""
    with open_text(path) as lines:
        for number, line in enumerate(strip_boms(lines), 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", _parse_json(line.rstrip(), f"{path}, line {number}")
            except json.JSONDecodeError as err:
                raise InputError(
                    f"{path}, line {number}: not JSON ({err.msg}, column {err.colno}): expected one object per line"
                ) from None


def _parse_json(text: str, where: str) -> Any:
    """Raises json.JSONDecodeError for what is not JSON, and InputError for JSON that Python cannot represent."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as err:  # an integer of thousands of digits; lists nested too deeply
        raise InputError(f"{where}: cannot be read: {err}") from None


_READERS: Readers = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": text_records,
}
EXTENSIONS = tuple(_READERS)
"""The endings of files that can be read, apart from a compression's."""


# ------------------------------------------------------------------------------------------------------------- columns


def column_names(record: Mapping[Any, Any]) -> str:
    """The names of a record's columns, for an error message."""
    names = ", ".join(repr(name) for name in itertools.islice(record, MAX_COLUMNS_SHOWN)) or "none"
    more = len(record) - MAX_COLUMNS_SHOWN
    return f"{names} and {more:,} more" if more > 0 else names


def is_missing(value: Any) -> bool:
    """Whether a column is empty: null, or the NaN that pandas writes for it.

    >>> is_missing(None), is_missing(float("nan")), is_missing("nan")
    (True, True, False)
    """
    return value is None or (isinstance(value, float) and math.isnan(value))


def column_text(value: Any, name: str, where: str) -> str:
    """The value of column `name` as text.

    Raises:
        InputError: for anything but text and numbers; the message begins with `where`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and not is_missing(value):
        return str(value)
    actual = type(value).__name__
    if is_missing(value):
        actual = "null" if value is None else "NaN, which is not text"
    raise InputError(f"{where}: column {name!r} should hold text, got {actual}: fix the row or use another column")
