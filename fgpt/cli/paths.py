"""Paths in files that are shared: run.json, reports, results. They do not reveal a home, a user or a disk.

A path in the working directory is written relative to it, any other by its last part: `.../rows.json`. A relative path
stays as the user gave it.

runs/NAME/local.json    what a run's run.json has shortened or left out, for --resume: full paths, and the seed of a
                        private training; not to be shared
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgpt.errors import InputError
from fgpt.io.files import read_json, write_json

LOCAL = "local.json"
ABOUT = "full paths on this machine, and the seed of private noise, for resuming the run here; do not share this file"
PRIVACY = "privacy"
"""The field of recipes whose seed is secret."""

ADAPTER = "adapter"
"""The field of recipes whose `init` may be a path."""
FIELDS = (
    "base",
    "teacher",
    "data",
    "eval_data",
    "forget",
    "documents",
    "source",
    "train",
    "test",
    "heldout",
    "tokenizer",
    "out",
)
"""The fields of recipes that may be paths."""

ABSOLUTE = re.compile(r"(?<![\w.:/~<])~?/[^\s'\"`:;,()<>|]+")
"""An absolute path within a sentence."""


def shareable(path: str | Path) -> str:
    """A path without what is private in it; a name on the Hugging Face Hub stays as it is.

    >>> shareable("/home/me/rows.json"), shareable("gpt2-medium")
    ('.../rows.json', 'gpt2-medium')
    """
    text = str(path)
    name, equals, rest = text.partition("=")  # NAME=PATH
    if equals and rest.startswith(("/", "~")) and "/" not in name:
        return f"{name}={shareable(rest)}"
    if not text.startswith(("/", "~")):
        return text
    here, full = Path.cwd(), Path(os.path.normpath(text))
    for root in (here, here.resolve()):
        if full.is_relative_to(root) and root != root.parent:
            return str(full.relative_to(root))
    return f".../{full.name}"


def without_paths(text: str) -> str:
    """A sentence, such as an error, with shareable paths."""
    return ABSOLUTE.sub(lambda match: shareable(match.group()), text)


def shareable_fields(run: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe, as plain JSON, with shareable paths, and without the seed of its privacy."""
    shared = {name: _field(x) if name in FIELDS else x for name, x in run.items()}
    if PRIVACY in run:
        shared[PRIVACY] = _without_seed(run[PRIVACY])
    if ADAPTER in run:
        shared[ADAPTER] = _with_short_init(run[ADAPTER])
    return shared


def _with_short_init(adapter: Mapping[str, Any]) -> dict[str, Any]:
    return {**adapter, "init": shareable(adapter["init"])} if "init" in adapter else {**adapter}


def _without_seed(privacy: Mapping[str, Any]) -> dict[str, Any]:
    return {**privacy, "seed": None}


def _field(value: Any) -> Any:
    if isinstance(value, list):
        return [shareable(x) for x in value]
    return shareable(value) if isinstance(value, str) else value


def write_full_paths(folder: Path, run: Mapping[str, Any]) -> None:
    """Write the fields that `shareable_fields` changes to local.json, if there are any."""
    short = shareable_fields(run)
    changed = {name: x for name, x in run.items() if short[name] != x and name != "out"}  # the run directory is in it
    if changed:
        write_json(folder / LOCAL, {"about": ABOUT, "paths": changed})
        os.chmod(folder / LOCAL, 0o600)


def with_full_paths(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The fields of run.json with their full paths from local.json. A field that was edited in run.json stays so.

    Raises InputError if local.json is damaged.
    """
    if not (folder / LOCAL).is_file():
        return run
    content = read_json(folder / LOCAL)
    full = content.get("paths") if isinstance(content, dict) else None
    if not isinstance(full, dict):
        raise InputError(f"{folder / LOCAL}: expected the full paths of a run; delete it to use run.json alone")
    return {name: full[name] if name in full and _fits(full[name], x) else x for name, x in run.items()}


def _fits(full: Any, short: Any) -> bool:
    """Whether `short` is `full` shortened, in any working directory."""
    if isinstance(full, dict) and isinstance(short, dict):
        return short in (_without_seed(full) if "seed" in full else full, _with_short_init(full))
    if isinstance(full, str) and isinstance(short, str):
        both = [[full], [short]]
    elif isinstance(full, list) and isinstance(short, list):
        both = [full, short]
    else:
        return False
    return len(both[0]) == len(both[1]) and all(map(_ends_as, *both))


def _ends_as(full: Any, short: Any) -> bool:
    if full == short:
        return True
    name, equals, rest = str(short).partition("=")  # NAME=PATH
    if equals and str(full).startswith(f"{name}="):
        full, short = str(full).removeprefix(f"{name}="), rest
    return os.path.normpath(str(full)).endswith("/" + str(short).removeprefix(".../"))
