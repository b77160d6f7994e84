"""Parquet and Arrow files, read a batch of rows at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fgpt.errors import InputError, one_line, printable
from fgpt.extras import require_extra

MAGIC = b"ARROW1"
"""What an Arrow file begins with. Without it the bytes are a stream, which the library `datasets` writes."""

BATCH = 1 << 13
"""Rows that are made into Python objects at a time."""


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file, each as (its number, its columns). Raises InputError if it is none."""
    with _arrow_errors(path, "Parquet"):
        import pyarrow.parquet  # imported here because importing fgpt must stay fast

        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow)
            yield from _rows(file.iter_batches(BATCH))


def read_arrow(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of an Arrow file or stream, each as (its number, its columns). Raises InputError if it is neither."""
    with _arrow_errors(path, "Arrow"):
        import pyarrow.ipc

        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(len(MAGIC)) == MAGIC
            source.seek(0)
            if is_file:
                file = pyarrow.ipc.open_file(source)
                _check_names(path, file.schema)
                yield from _rows(file.get_batch(i) for i in range(file.num_record_batches))
            else:
                stream = pyarrow.ipc.open_stream(source)
                _check_names(path, stream.schema)
                yield from _rows(stream)


def _check_names(path: Path, schema: Any) -> None:
    """Raises InputError if two columns have the same name: a row would hold the last one alone."""
    if repeated := [name for name in dict.fromkeys(schema.names) if schema.names.count(name) > 1]:
        raise InputError(f"{path}: two columns are called {printable(repeated[0])!r}: give each a name of its own")


def _rows(batches: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            for record in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield f"row {number}", record


@contextmanager
def _arrow_errors(path: Path, kind: str) -> Iterator[None]:
    require_extra("data", f"{kind} files", "pyarrow")
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as err:
        raise InputError(
            f"{path}: not a{'n' if kind[0] == 'A' else ''} {kind} file ({first_line(err)}): write it again"
        ) from None


def first_line(err: Exception) -> str:
    """The first line of another library's error, or the name of its class."""
    return one_line((str(err).splitlines() or [type(err).__name__])[0])
