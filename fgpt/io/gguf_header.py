"""The header of GGUF files: metadata, and type, shape and offset of each tensor.

The header is read here and not by `gguf.GGUFReader`, which takes the counts in it on trust: a corrupt count has it loop
for hours over nothing. Here a count, a length or an offset that the rest of the file cannot hold is an error before
anything of that size is made. Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fgpt.errors import InputError
from fgpt.extras import require_extra

MAGIC = b"GGUF"
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""The type codes of scalars, as `struct` names them."""
STRING, ARRAY = 8, 9
MAX_COUNTS = {"keys": 1 << 16, "tensors": 1 << 20, "bytes of a name": 1 << 16, "elements of a list": 1 << 24}
"""Far above what any model has: above it a header is corrupt, even if the file could hold it."""

MAX_NAME_LENGTH = 500
"""Far above any name, of a key or a tensor."""
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are read as they are."""
CHUNK = 1 << 20
"""Elements that are dequantized at a time: of a large table, only the result is in memory as a whole."""


@dataclass(frozen=True)
class Entry:
    """A tensor in the file: its type, its shape in torch's order, and its bytes."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Container:
    """Metadata by key, tensors by the file's own names."""

    path: Path
    fields: dict[str, Any]
    entries: dict[str, Entry]


def read_header(path: Path) -> Container:
    """The header of a GGUF file.

    Raises InputError if the file is missing, is no GGUF, is truncated, or holds what cannot be read, and without the
    package gguf.
    """
    require_extra("gguf", "GGUF files", "gguf")
    with _open(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        header = _Header(path, file, size)
        fields, infos = header.parse()
        if isinstance(fields.get("split.count"), int) and fields["split.count"] > 1:
            raise InputError(
                f"{path}: is one of {fields['split.count']} parts; merge them with llama-gguf-split --merge"
            )
        start = _align(file.tell(), header.alignment(fields))
    entries = {name: _entry(path, name, kind, shape, start + at) for name, (kind, shape, at) in infos.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset < end or entry.offset % header.alignment(fields):
            raise header.error(f"tensor {name} begins at byte {entry.offset}, inside another or off its alignment")
        end = entry.offset + entry.size
        if end > size:
            raise header.error(f"tensor {name} ends at byte {end:,}, the file at {size:,}")
    return Container(path, fields, entries)


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """A tensor of the file, on its own memory: quantized types as fp32, others as they are.

    Raises InputError if the file has become shorter.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[entry.kind]
    out = torch.empty(entry.shape, dtype=FLOAT_TYPES.get(entry.kind, torch.float32))
    with _open(path) as file:
        file.seek(entry.offset)
        if entry.kind in FLOAT_TYPES:
            raw = out.view(-1).view(torch.uint8).numpy()
            if file.readinto(raw) != entry.size:  # pyright: ignore[reportAttributeAccessIssue]
                raise _shrunk_error(path)
            return out
        block, wide = GGML_QUANT_SIZES[kind]
        rows = out.view(-1, entry.shape[-1])
        width = entry.shape[-1] // block * wide  # bytes of a row
        for chunk in rows.split(max(1, CHUNK // rows.shape[1])):
            data = file.read(len(chunk) * width)
            if len(data) != len(chunk) * width:
                raise _shrunk_error(path)
            with np.errstate(all="ignore"):  # a corrupt scale may be infinite
                chunk.copy_(torch.from_numpy(dequantize(np.frombuffer(data, np.uint8).reshape(-1, width), kind)))
    return out


class _Header:
    """A reader that never asks for more than the rest of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size

    def error(self, what: str) -> InputError:
        return InputError(f"{self.path}: not a whole GGUF file: {what}; fetch it again")

    def parse(self) -> tuple[dict[str, Any], dict[str, tuple[int, tuple[int, ...], int]]]:
        """Metadata, and of each tensor its type, its shape and its offset in the data."""
        if self.size < 24 or self.take(4) != MAGIC:
            raise InputError(f"{self.path}: not a GGUF file: it does not begin with {MAGIC.decode()}")
        version = self.scalar("<I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            got = "a big-endian file" if swapped else f"version {version}"
            raise InputError(f"{self.path}: expected GGUF version 2 or 3 in little-endian order, got {got}")
        tensors, keys = self.scalar("<Q"), self.scalar("<Q")
        self.check_count(tensors, "tensors", 24)
        self.check_count(keys, "keys", 13)
        fields: dict[str, Any] = {}
        for _ in range(keys):
            key = self.name(fields)
            fields[key] = self.value(key, self.scalar("<I"))
        infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = self.name(infos)
            axes = self.scalar("<I")
            if not 1 <= axes <= 4:
                raise self.error(f"tensor {name} has {axes} axes, expected 1 to 4")
            shape = struct.unpack(f"<{axes}Q", self.take(8 * axes))[::-1]  # the file puts the fastest axis first
            infos[name] = (self.scalar("<I"), shape, self.scalar("<Q"))
        return fields, infos

    def alignment(self, fields: dict[str, Any]) -> int:
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment!r}, expected a power of two")
        return alignment

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise self.error(f"{count:,} bytes are to follow byte {self.file.tell():,}, the file ends at {self.size:,}")
        return self.file.read(count)

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def check_count(self, count: int, of: str, least: int) -> int:
        """`count`, if the rest of the file can hold `count` items of `least` bytes or more."""
        if count > MAX_COUNTS.get(of, self.size) or count * least > self.size - self.file.tell():
            raise self.error(f"it declares {count:,} {of} at byte {self.file.tell():,} of {self.size:,}")
        return count

    def text(self, of: str) -> str:
        try:
            return self.take(self.check_count(self.scalar("<Q"), of, 1)).decode()
        except UnicodeDecodeError as err:
            raise self.error(f"text before byte {self.file.tell():,} is not UTF-8 ({err.reason})") from None

    def name(self, taken_names: dict[str, Any]) -> str:
        name = self.text("bytes of a name")
        if not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise self.error(f"something is called {name!r:.80}, expected up to {MAX_NAME_LENGTH} printable characters")
        if name in taken_names:
            raise self.error(f"{name} is there twice")
        return name

    def value(self, key: str, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.text("bytes of text")
        if kind != ARRAY:
            raise self.error(f"{key} is of type {kind}, expected 0 to 12")
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind == STRING:
            return [self.text("bytes of text") for _ in range(self.check_count(count, "elements of a list", 8))]
        if kind not in SCALARS:
            raise self.error(f"{key} is a list of type {kind}, expected plain values or text")
        dtype = np.dtype(SCALARS[kind])
        self.check_count(count, "elements of a list", dtype.itemsize)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def _entry(path: Path, name: str, number: int, shape: tuple[int, ...], offset: int) -> Entry:
    """Raises InputError for a type that cannot be expanded, or a shape that it cannot have."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        kind = GGMLQuantizationType(number)
        block, wide = GGML_QUANT_SIZES[kind]
        if kind.name not in FLOAT_TYPES:
            dequantize(np.zeros((1, wide), np.uint8), kind)  # the one public way to ask whether it can
    except (ValueError, KeyError, NotImplementedError):
        known = getattr(locals().get("kind"), "name", f"type {number}")
        raise InputError(
            f"{path}: tensor {name} is stored as {known}; expected F32, F16, BF16 or a quantized type that the gguf "
            "package expands (Q4_0 to Q8_0, the K and IQ types)"
        ) from None
    if 0 in shape or shape[-1] % block:
        raise InputError(
            f"{path}: tensor {name} has shape {list(shape)}; expected rows of {kind.name}, in multiples of {block}"
        )
    return Entry(kind.name, shape, offset, math.prod(shape) // block * wide)


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as err:
        raise InputError(f"{path}: {err.strerror or err}; expected a GGUF file") from None


def _shrunk_error(path: Path) -> InputError:
    return InputError(f"{path}: has become shorter since it was opened; fetch it again")


def _align(offset: int, to: int) -> int:
    return -(-offset // to) * to
