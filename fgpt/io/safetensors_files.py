"""Safetensors files: written whole or not at all, read with errors that name the file, tensor by tensor if wanted, or a
part of one.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fgpt.errors import InputError, one_line, printable, short_repr
from fgpt.families.mapping import LazyTensor
from fgpt.io.files import read_json, to_utf8, write


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. The metadata defaults to what transformers expects. Tensors that share their storage,
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


def read_tensors(path: Path, keep: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose name `keep` accepts.

    Raises InputError if the file is missing, truncated or malformed.
    """
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys() if keep(name)}  # noqa: SIM118


def shards(folder: Path, weights: str) -> list[Path]:
    """The safetensors files of a model: `weights` itself, or those that `weights`.index.json lists.

    Raises InputError if the index names a file that is not there.
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
    """The files that `weights`.index.json lists. Raises InputError if it is no index."""
    index = folder / f"{weights}.index.json"
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise InputError(f"{index}: expected a weight_map of tensor names to file names")
    return sorted(set(weight_map.values()))


def lazy_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, each to be read when it is asked for, into memory of its own: a mapped file
    would count as memory as far as it was read.

    Raises InputError if the file is missing, truncated or malformed, before anything is read.
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
        _read_at(path, [begin + entry["data_offsets"][0]], x)
        return x

    def read_part(entry: Mapping[str, Any], axis: int, ranges: Sequence[slice]) -> Tensor:
        (rows, columns), dtype = entry["shape"], DTYPES[entry["dtype"]]
        size, at = sum(part.stop - part.start for part in ranges), begin + entry["data_offsets"][0]
        row_bytes = columns * dtype.itemsize
        if axis == 0:
            x = torch.empty(size, columns, dtype=dtype)
            for part, y in zip(ranges, x.split([part.stop - part.start for part in ranges]), strict=True):
                _read_at(path, [at + part.start * row_bytes], y)
            return x
        pieces = [torch.empty(rows, part.stop - part.start, dtype=dtype) for part in ranges]
        for part, y in zip(ranges, pieces, strict=True):
            _read_at(path, [at + i * row_bytes + part.start * dtype.itemsize for i in range(rows)], y)
        return torch.cat(pieces, 1)

    return {
        name: LazyTensor(tuple(header[name]["shape"]), partial(read, header[name]), partial(read_part, header[name]))
        for name in names
    }


def _read_at(path: Path, offsets: Sequence[int], x: Tensor) -> None:
    """Fill `x` with the bytes of a file: an equal part of it from each offset on."""
    flat: Any = x.view(-1).view(torch.uint8).numpy()
    step = len(flat) // len(offsets)
    with path.open("rb", buffering=0) as raw:
        for i, offset in enumerate(offsets):
            into = memoryview(flat)[i * step : (i + 1) * step]
            raw.seek(offset)
            while into:
                if not (n := raw.readinto(into)):
                    raise InputError(f"{path}: the file ended while it was read")
                into = into[n:]


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
    """`path`, or a link to it if its name is not UTF-8, which safetensors cannot open."""
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
        raise InputError(
            f"{path}: a tensor is called {short_repr(name)}; expected up to {MAX_NAME_LENGTH} printable characters"
        )
    if len(shape) > MAX_AXES:
        raise InputError(f"{path}: tensor {name} has {len(shape)} axes; expected at most {MAX_AXES}")


MAX_NAME_LENGTH, MAX_AXES = 500, 8
"""Far above what any model has."""
