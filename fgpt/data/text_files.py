"""UTF-8 text files, with or without a byte order mark, plain or compressed."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fgpt.errors import InputError, one_line
from fgpt.extras import require_extra


def _open_zstd(path: Path) -> io.BufferedReader:
    require_extra("data", "files compressed by zstd", "pyarrow")
    import pyarrow  # imported here because importing fgpt must stay fast

    stream: Any = pyarrow.input_stream(path, compression="zstd")
    return io.BufferedReader(stream)


OPENERS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
"""Functions that open a compressed file, by its extension."""

CHUNK = 1 << 20
"""Bytes that are decompressed at a time while a file is checked."""


def file_format(path: Path) -> str:
    """The extension that says a file's format, in lower case, without that of a compression.

    >>> file_format(Path("data.jsonl")), file_format(Path("data.JSONL.gz"))
    ('.jsonl', '.jsonl')
    """
    compressed = path.suffix.lower() in OPENERS
    return (path.with_suffix("") if compressed else path).suffix.lower()


def open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """Open a UTF-8 file for reading, decompressed according to its extension, without a byte order mark.

    A compressed file is first decompressed once to check it: only its end says whether it is complete, and the content
    of a damaged file would look like a fault of the text.
    """
    opener = OPENERS.get(path.suffix.lower())
    if opener is not None:
        with opener(path) as stream:
            while stream.read(CHUNK):
                pass
    stream = path.open("rb") if opener is None else opener(path)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def strip_boms(lines: Iterable[str]) -> Iterator[str]:
    """`lines` without byte order marks at their beginnings: concatenated files have one for each part."""
    return (line.removeprefix("\ufeff") for line in lines)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn whatever reading a file raises into InputError: it does not exist, is not UTF-8, is damaged, or is not
    compressed as its name says.
    """
    try:
        yield
    except UnicodeDecodeError as err:
        raise InputError(f"{path}: not UTF-8 text ({err.reason} at byte {err.start}): save it as UTF-8") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as err:
        system_error = err.strerror if isinstance(err, OSError) and err.errno is not None else None
        extension = path.suffix.lower()
        if extension in OPENERS and not system_error:
            raise InputError(
                f"{path}: damaged, or not compressed as its name says ({extension}; {one_line(err)}): compress it "
                "again, or rename it"
            ) from None
        raise InputError(f"{path}: cannot be read: {system_error or one_line(err)}") from None
