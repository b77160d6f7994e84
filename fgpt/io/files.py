"""Files that are there whole or not at all, and readers whose errors name the file."""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fgpt.errors import InputError, one_line, printable, shown
from fgpt.families.mapping import LazyTensor


def to_utf8(text: str) -> bytes:
    r"""`text` in UTF-8, by the rule for every file that is written: half of a surrogate pair, for which UTF-8 has no
    bytes, becomes its escape, as in \ud83d. In JSON that escape is read back as what it stands for.
    """
    return text.encode("utf-8", "backslashreplace")


def write(path: Path, *data: bytes | memoryview | str) -> None:
    """Write `data`, part after part, to a temporary name in the same folder, flush it to disk, and rename it to `path`.
    Where `path` is a symbolic link, the link is replaced, and not what it points to. Text is written as `encoded` says.

    Raises InputError where the disk is full or the folder cannot be written; an older `path` then stays as it was.
    """
    temporary = None
    try:
        _make_parent(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        with os.fdopen(handle, "wb") as file:
            for part in data:
                file.write(to_utf8(part) if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _fsync_dir(path.parent)
    except OSError as err:
        _check_not_moved(path)
        raise InputError(f"cannot write {path}: {err.strerror or err}; free space or choose another folder") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A new folder to write files into, which takes the name `path` when all are written, in the place of an older one:
    a reader finds the old files, or the new, and never some of each. Where `path` is a symbolic link, the link is
    replaced, and not what it points to.

    Raises InputError where the disk is full or the folder cannot be written; an older `path` then stays as it was.
    """
    try:
        _make_parent(path)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL))
        try:
            os.chmod(temporary, 0o755)
            yield temporary
            _check_not_moved(path)
            _fsync_dir(temporary)
            _replace(temporary, path)
            _fsync_dir(path.parent)
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


def remove_leftovers(folder: Path) -> None:
    """Delete in `folder` itself what a killed process had not written to its end, and bring back a folder that it had
    put aside and not replaced. Nothing is touched but temporary names of ours, and nothing behind a symbolic link.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if not (match := TEMPORARY.fullmatch(path.name)):
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
    found = os.stat(folder)
    return found.st_dev, found.st_ino


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


def _fsync_dir(folder: Path) -> None:
    """Bring a folder's names, new and renamed, to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; a path in `value` becomes its text."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False, default=os.fspath) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. The metadata defaults to what the hub's libraries expect. Tensors that share their storage,
    as the codes of quantized weights do, are each written in full. The same tensors make the same file, bit for bit.

    Raises InputError for a tensor without storage, and as `write` does.
    """
    unshared: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, x in tensors.items():
        if x.is_meta:
            raise InputError(f"{name} has no storage (it is on the meta device): nothing to write to {path}")
        x = x.detach().contiguous()
        unshared[name] = x.clone() if x.untyped_storage().data_ptr() in storages else x
        storages.add(unshared[name].untyped_storage().data_ptr())
    data = memoryview(save(unshared, metadata or {"format": "pt"}))
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:begin]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors has its entries in any order
    text = to_utf8(json.dumps(header, separators=(",", ":"), ensure_ascii=False))
    text += b" " * (-len(text) % 8)  # as the format aligns what follows
    write(path, len(text).to_bytes(8, "little"), text, data[begin:])


def read_json(path: Path) -> Any:
    """Raises InputError where the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as err:
        raise InputError(f"{path}: {err.strerror}; expected a JSON file") from None
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: not valid JSON: {err}") from None


def read_text(path: Path) -> str:
    """A text, as it is but for a byte order mark, of a file, or where that is - of what is piped in.

    Raises InputError where there is none, or it is not in UTF-8.
    """
    try:
        text = (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode("utf-8-sig")
    except OSError as err:
        raise InputError(f"{path}: {err.strerror}; expected a text file") from None
    except UnicodeDecodeError as err:
        raise InputError(f"{path}: not a text in UTF-8 (byte {err.start}): save it as such") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty, expected a text")
    return text


def read_tensors(path: Path, keep: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose name `keep` accepts.

    Raises InputError where the file is missing, truncated or malformed.
    """
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys() if keep(name)}  # noqa: SIM118


def shards(folder: Path, weights: str) -> list[Path]:
    """The safetensors files of a model: `weights` itself, or those that `weights`.index.json lists.

    Raises InputError where the index names a file that is not there.
    """
    index = folder / f"{weights}.index.json"
    if (folder / weights).exists() or not index.exists():
        return [folder / weights]
    names = shard_names(folder, weights)
    if odd := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise InputError(
            f"{index} names {printable(odd[0])}, which is not beside it ({len(odd)} of {len(names)} files missing)"
        )
    return [folder / name for name in names]


def shard_names(folder: Path, weights: str) -> list[str]:
    """The files that `weights`.index.json lists. Raises InputError where it is no index."""
    index = folder / f"{weights}.index.json"
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: expected a weight_map of tensor names to file names")
    return sorted(set(weight_map.values()))


def lazy_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, each to be read when it is asked for, into memory of its own: a mapped file
    would count as memory as far as it was read.

    Raises InputError where the file is missing, truncated or malformed, before anything is read.
    """
    with _open_safetensors(path) as file:  # its header is whole and consistent, and the file as long as it says
        names = list(file.keys())
    with path.open("rb") as raw:
        begin = 8 + int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(begin - 8))
    if odd := [name for name in names if header[name]["dtype"] not in DTYPES]:
        raise InputError(f"{path}: tensor {odd[0]} has dtype {header[odd[0]]['dtype']}, expected {', '.join(DTYPES)}")

    def read(entry: Mapping[str, Any]) -> Tensor:
        x = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        flat: Any = x.view(-1).view(torch.uint8).numpy()
        into = memoryview(flat)
        with path.open("rb", buffering=0) as raw:
            raw.seek(begin + entry["data_offsets"][0])
            while into:
                if not (n := raw.readinto(into)):
                    raise InputError(f"{path}: the file ended while it was read")
                into = into[n:]
        return x

    return {name: LazyTensor(tuple(header[name]["shape"]), partial(read, header[name])) for name in names}


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors that models are made of."""


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises InputError as `read_tensors` does."""
    with _open_safetensors(path) as file:
        return file.metadata() or {}


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a safetensors file")
    try:
        with _in_utf8(path) as named, safe_open(named, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                _check_readable(path, name, file.get_slice(name).get_shape())
            yield file
    except InputError:  # which is a ValueError
        raise
    except (SafetensorError, OSError, ValueError) as err:
        raise InputError(f"{path}: not a whole safetensors file: {one_line(err)}") from None


@contextmanager
def _in_utf8(path: Path) -> Iterator[Path]:
    """`path`, or where it is no text in UTF-8, which is all that safetensors opens, a link that leads to it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as at:
            link = Path(at) / "link"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def _check_readable(path: Path, name: str, shape: list[int]) -> None:
    """Raises InputError for a tensor of a name that no line could show, or of a shape that none of ours has."""
    if not name.isprintable() or len(name) > MAX_NAME_LENGTH:
        raise InputError(f"{path}: a tensor is called {shown(name)}; expected up to {MAX_NAME_LENGTH} printable characters")
    if len(shape) > MAX_AXES:
        raise InputError(f"{path}: tensor {name} has {len(shape)} axes; expected at most {MAX_AXES}")


MAX_NAME_LENGTH, MAX_AXES = 500, 8
"""Far above what any model has."""
