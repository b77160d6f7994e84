"""Atomic writes of files and folders, and JSON and text files, read with errors that name the file."""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fgpt.errors import InputError

logger = logging.getLogger(__name__)


def to_utf8(text: str) -> bytes:
    r"""`text` in UTF-8, by the rule for every file that is written: half of a surrogate pair, for which UTF-8 has no
    bytes, becomes its escape, as in \ud83d. In JSON that escape is read back as what it stands for.
    """
    return text.encode("utf-8", "backslashreplace")


def write(path: Path, *data: bytes | memoryview | str) -> None:
    """Write `data`, part after part, to a temporary name in the same folder, flush it to disk, and rename it to `path`.
    If `path` is a symbolic link, the link is replaced, not its target. Text is written as `encoded` says.

    Raises InputError if the disk is full or the folder cannot be written; an older `path` then stays as it was.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for part in data:
            file.write(to_utf8(part) if isinstance(part, str) else part)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """The name of a new file to write, which takes the name `path` when it is written to its end.

    Raises InputError if the disk is full or the folder cannot be written; an older `path` then stays as it was.
    """
    temporary = None
    try:
        _make_parent(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _fsync(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _fsync(path.parent)
        logger.debug("wrote %s", path)
    except OSError as err:
        _check_not_moved(path)
        raise InputError(f"cannot write {path}: {err.strerror or err}; free space or choose another folder") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A new folder to write files into, which takes the name `path` when all are written, in the place of an older one:
    a reader finds the old files, or the new, and never some of each. Where `path` is a symbolic link, the link is
    replaced, and not what it points to.

    Raises InputError if the disk is full or the folder cannot be written; an older `path` then stays as it was.
    """
    try:
        _make_parent(path)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL))
        try:
            os.chmod(temporary, 0o755)
            yield temporary
            _check_not_moved(path)
            _fsync(temporary)
            _replace(temporary, path)
            _fsync(path.parent)
            logger.debug("wrote %s", path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as err:
        _check_not_moved(path)
        raise InputError(f"cannot write {path}: {err.strerror or err}; free space or choose another folder") from None


# -------------------------------------------------------------------------------------------------- temporary names

PARTIAL, ASIDE = ".fgpt-partial", ".fgpt-aside"
"""How the names end of what is being written, and of a folder that is about to be replaced."""

TEMPORARY = re.compile(rf"\.(?P<name>.+)\.[a-z0-9_]{{8}}({re.escape(PARTIAL)}|{re.escape(ASIDE)})", re.DOTALL)
"""A temporary name of ours, and of nobody else: as tempfile makes it between our beginning and our ending."""


def _replace(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`. An older one is put aside first: it cannot be renamed over."""
    if not os.path.lexists(path):
        os.rename(new, path)
        return
    aside = new.with_name(new.name.removesuffix(PARTIAL) + ASIDE)
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(aside, path)
        raise
    remove(aside)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; of a symbolic link the link, and not what it points to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete in `folder` itself what a killed process had not written to its end, and bring back a folder that it had
    put aside and not replaced. Nothing is touched but temporary names of ours, with `name` only those of what has this
    name, and nothing behind a symbolic link.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = TEMPORARY.fullmatch(path.name)
        if match is None or (name is not None and match["name"] != name):
            continue
        whole = folder / match["name"]
        if path.name.endswith(ASIDE) and not os.path.lexists(whole):
            os.rename(path, whole)
        else:
            remove(path)


# ------------------------------------------------------------------------------------- folders that must not move

_MUST_NOT_MOVE: dict[Path, tuple[int, int]] = {}
"""Which folders have to stay in their place now, with their device and inode."""


@contextmanager
def must_not_move(folder: Path) -> Iterator[None]:
    """Within it nothing is written below `folder` any more once that is gone, or another: else what is written after a
    folder was renamed would make a second one under the old name, with half of the files.
    """
    _MUST_NOT_MOVE[folder] = _identity(folder)
    try:
        yield
    finally:
        del _MUST_NOT_MOVE[folder]


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _check_not_moved(path: Path) -> None:
    for folder, identity in _MUST_NOT_MOVE.items():
        if folder not in path.parents:
            continue
        try:
            if _identity(folder) == identity:
                continue
        except OSError:
            pass
        raise InputError(f"{folder} was renamed or deleted while it was in use: {path.name} is not written")


def _make_parent(path: Path) -> None:
    _check_not_moved(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def _fsync(path: Path) -> None:
    """Bring a file, or a folder's names, new and renamed, to disk."""
    if os.name == "nt":
        if path.is_dir():  # Windows opens no folder, and syncs only what can be written
            return
        handle = os.open(path, os.O_RDWR)
    else:
        handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; a path in `value` becomes its text."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False, default=os.fspath) + "\n")


def read_json(path: Path) -> Any:
    """Raises InputError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as err:
        raise InputError(f"{path}: {err.strerror}; expected a JSON file") from None
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: not valid JSON: {err}") from None


def read_text(path: Path) -> str:
    """The text of a file, or of standard input if `path` is "-", without a byte order mark.

    Raises InputError if there is none, or it is not in UTF-8.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        text = (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode("utf-8-sig")
    except OSError as err:
        raise InputError(f"{name}: {err.strerror}; expected a text file") from None
    except UnicodeDecodeError as err:
        raise InputError(f"{name}: not a text in UTF-8 (byte {err.start}): save it as such") from None
    if not text.strip():
        raise InputError(f"{name} is empty: expected a text")
    return text
