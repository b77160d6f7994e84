"""Text files as they come: with a byte order mark or without one, plain or compressed."""

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


def _zstd(path: Path) -> io.BufferedReader:
    import pyarrow  # here, because importing fgpt must stay fast

    stream: Any = pyarrow.input_stream(path, compression="zstd")
    return io.BufferedReader(stream)


OPENERS: Mapping[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
"""How to unpack a file, by the end of its name."""

CHUNK = 1 << 20


def format_of(path: Path) -> str:
    """The end of a file's name that tells its format, in lower case: ".jsonl" of data.jsonl and of data.JSONL.gz."""
    packed = path.suffix.lower() in OPENERS
    return (path.with_suffix("") if packed else path).suffix.lower()


def open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """A file of UTF-8 to read text from, unpacked where its name says so, without a byte order mark.

    A compressed file is read through once before: only its end says whether it is whole, and what a damaged one holds
    would be taken for a fault of the text.
    """
    opener = OPENERS.get(path.suffix.lower())
    if opener is not None:
        with opener(path) as stream:
            while stream.read(CHUNK):
                pass
    stream = path.open("rb") if opener is None else opener(path)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def without_marks(lines: Iterable[str]) -> Iterator[str]:
    """`lines` without the byte order marks before them: where files were put together, the mark of each is there."""
    return (line.removeprefix("\ufeff") for line in lines)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever reading a file raises, as InputError: not there, not UTF-8, damaged, or not packed as its name says."""
    try:
        yield
    except UnicodeDecodeError as err:
        raise InputError(f"{path}: not UTF-8 text ({err.reason} at byte {err.start}): save it as UTF-8") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as err:
        own = isinstance(err, OSError) and bool(err.strerror) and err.errno is not None
        end = path.suffix.lower()
        if end in OPENERS and not own:
            raise InputError(
                f"{path}: damaged, or not compressed as its name says ({end}; {one_line(err)}): compress it again, or "
                "rename it"
            ) from None
        cause = err.strerror if own and isinstance(err, OSError) else one_line(err)
        raise InputError(f"{path}: cannot be read: {cause}") from None
