"""Paths as they stand in what a person shares: run.json, pages, figures. They name no home, user or disk.

A path below the working directory is written relative to it, any other by its last part alone: `.../rows.json`. A path
that the user gave as a relative one stays as it was given.

runs/NAME/local.json    the full paths of a run whose run.json has them shortened, for --resume; not to be shared
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgpt.errors import InputError
from fgpt.io.files import read_json, write_json

LOCAL = "local.json"
ABOUT = "full paths on this machine, by which the run is resumed and used here; do not share this file"

FIELDS = ("base", "data", "source", "train", "test", "heldout", "tokenizer", "out")
"""The options of runs that may name files."""

JOINED_FIELD = "data"
"""The one of them that takes several files, with a + between them."""

ABSOLUTE = re.compile(r"(?<![\w.:/~<])~?/[^\s'\"`:;,()<>|]+")
"""Within a sentence."""


def shareable(path: str | Path) -> str:
    """A path, or what may be one; a name of the hub's is none, and stays."""
    text = str(path)
    if not text.startswith(("/", "~")):
        return text
    here, full = Path.cwd(), Path(os.path.normpath(text))
    for at in (here, here.resolve()):
        if full.is_relative_to(at) and at != at.parent:
            return str(full.relative_to(at))
    return f".../{full.name}"


def without_paths(text: str) -> str:
    """A sentence, such as an error, whose paths are shareable."""
    return ABSOLUTE.sub(lambda found: shareable(found.group()), text)


def shareable_fields(run: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run, as plain JSON, with shareable paths."""
    return {name: _field(name, x) if name in FIELDS else x for name, x in run.items()}


def _field(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [shareable(x) for x in value]
    if not isinstance(value, str):
        return value
    return "+".join(map(shareable, value.split("+"))) if name == JOINED_FIELD else shareable(value)


def write_full_paths(folder: Path, run: Mapping[str, Any]) -> None:
    """Keep those fields of a run that `shared` changes, where it changes any."""
    short = shareable_fields(run)
    changed = {name: x for name, x in run.items() if short[name] != x and name != "out"}  # there it lies itself
    if changed:
        write_json(folder / LOCAL, {"about": ABOUT, "paths": changed})
        os.chmod(folder / LOCAL, 0o600)


def with_full_paths(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The fields that run.json has, with the full paths that were shortened in it. A field that was edited since, in
    run.json, is as it is there.

    Raises InputError where the file of full paths is damaged.
    """
    if not (folder / LOCAL).is_file():
        return run
    found = read_json(folder / LOCAL)
    full = found.get("paths") if isinstance(found, dict) else None
    if not isinstance(full, dict):
        raise InputError(f"{folder / LOCAL}: expected the full paths of a run; delete it to use run.json alone")
    return {name: full[name] if name in full and _fits(name, full[name], x) else x for name, x in run.items()}


def _fits(name: str, full: Any, short: Any) -> bool:
    """Whether `full` was shortened to `short`, in whatever working directory."""
    if isinstance(full, str) and isinstance(short, str):
        both = [x.split("+") if name == JOINED_FIELD else [x] for x in (full, short)]
    elif isinstance(full, list) and isinstance(short, list):
        both = [full, short]
    else:
        return False
    return len(both[0]) == len(both[1]) and all(map(_ends_as, *both))


def _ends_as(full: Any, short: Any) -> bool:
    return full == short or os.path.normpath(str(full)).endswith("/" + str(short).removeprefix(".../"))
