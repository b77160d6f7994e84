"""How a source of data is written: PATH_OR_NAME[:CONFIG][@REVISION][[SPLIT]][:WEIGHT].

mine.jsonl   data/*.parquet   folder   alpaca   owner/name   owner/name:config@v1[train[:1000]]:0.7
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from fgpt.data.splits import parse_split
from fgpt.errors import InputError, short_repr

DRIVE = re.compile(r"[A-Za-z]:[\\/]")
"""What an absolute path of Windows begins with."""
WEIGHT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A source of data, as `parse_source` reads it and `str` writes it.

    >>> str(Source("owner/name", "config", split="train[:10%]", weight=0.5))
    'owner/name:config[train[:10%]]:0.5'
    """

    name: str
    """A path, a pattern of paths, or the name of a dataset on the hub."""
    config: str | None = None
    """The configuration of a folder or a dataset on the hub."""
    revision: str | None = None
    """A branch, tag or commit on the hub."""
    split: str | None = None
    """Splits and slices, in the syntax of the library `datasets`."""
    weight: float | None = None
    """The share in a mixture."""

    def __str__(self) -> str:
        text = self.name + (f":{self.config}" if self.config else "") + (f"@{self.revision}" if self.revision else "")
        text += f"[{self.split}]" if self.split else ""
        if self.weight is not None:
            return f"{text}:{self.weight!r}"
        return f"{text}:" if WEIGHT.fullmatch(text.rpartition(":")[2]) and not exists(text) else text


def parse_source(text: str) -> Source:
    """The parts of a source. A path that exists as it is written comes first.

    A number after the last colon is the weight; after a configuration whose name is a number, write a colon more.

    Raises:
        InputError: if the weight is not positive and finite, or the split is not one.

    >>> parse_source("owner/name:config@v1[train[:1000]]:0.7")
    Source(name='owner/name', config='config', revision='v1', split='train[:1000]', weight=0.7)
    >>> parse_source("mine.jsonl[:1000]")
    Source(name='mine.jsonl', config=None, revision=None, split=':1000', weight=None)
    """
    if not text or exists(text):
        return Source(text)
    if "://" in text:
        raise InputError(f"source {short_repr(text)}: expected a path, or the name of a dataset on the hub, not a URL")
    rest, weight = _take_weight(text)
    if exists(rest):
        return Source(rest, weight=weight)
    rest, split = _take_split(rest)
    name, config, revision = _divide_name(rest)
    return Source(name, config, revision, split, weight)


def exists(text: str) -> bool:
    """Whether a text is the path of a file or folder."""
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def _take_weight(text: str) -> tuple[str, float | None]:
    before, colon, last = text.rpartition(":")
    if not before or not colon or (last and not WEIGHT.fullmatch(last)):
        return text, None
    if not last:
        return before, None
    weight = float(last)
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"source {short_repr(text)}: its weight is {last}, expected a positive number, such as 0.7")
    return before, weight


def _take_split(text: str) -> tuple[str, str | None]:
    """The text before a split in brackets, and the split. Other brackets belong to a pattern of paths."""
    if not text.endswith("]"):
        return text, None
    depth = 0
    for start in range(len(text) - 1, 0, -1):
        depth += (text[start] == "]") - (text[start] == "[")
        if depth == 0:
            split = text[start + 1 : -1]
            if not re.fullmatch(r"\w+", split) and not set(split) & set(":[+"):
                return text, None
            parse_split(split)
            return text[:start], split
    return text, None


def _divide_name(text: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and revision."""
    if exists(text):
        return text, None, None
    before, _, config = text.rpartition(":")
    if config and exists(before) and not DRIVE.fullmatch(text[: len(before) + 2]):
        return before, config, None
    drive = text[:2] if DRIVE.match(text) else ""
    name, _, revision = text[len(drive) :].partition("@")
    name, _, config = name.partition(":")
    return drive + name, config or None, revision or None
