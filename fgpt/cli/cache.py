"""The user's cache folder, ~/.cache/fgpt or what FGPT_CACHE names: what is slow to make, by a hash of all that it
follows from. It may be deleted at any time.

    tokens/KEY/                  the examples and rows of a source: `fgpt.cli.training.token_cache`
    reference/KEY/               log-probabilities under the reference policy: `fgpt.cli.training.reference_cache`
    format_cost/KEY/             what the format of a base costs: `fgpt.cli.training.format_cost`

What was not used for `UNUSED_DAYS` is deleted when something new is put there.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fgpt.cli.console import console
from fgpt.io.files import remove

VARIABLE = "FGPT_CACHE"
"""The environment variable that names the cache folder."""
UNUSED_DAYS = 30
LOCK = "lock"
KEY = re.compile("[0-9a-f]{32}")
"""The names of its folders."""


def cache_folder(kind: str) -> Path:
    """Where things of a kind are kept, each in a folder of its own."""
    named, system = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    base = Path(named) if named else (Path(system) if system else Path.home() / ".cache") / "fgpt"
    return base / kind


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One process at a time makes what a folder holds; another one that needs it waits for it.

    Raises OSError if the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        yield


def note_use(folder: Path) -> None:
    """Remember that what a folder holds was used now."""
    with contextlib.suppress(OSError):  # of a cache that cannot be written, nothing is deleted either
        os.utime(folder)


def remove_unused(kind: str) -> None:
    """Delete what was not used for `UNUSED_DAYS`, and print how much that was. What another process holds is kept."""
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    count = size = 0
    for folder in cache_folder(kind).iterdir():
        try:
            is_ours = KEY.fullmatch(folder.name) and (folder / LOCK).is_file() and not folder.is_symlink()
            if not is_ours or folder.stat().st_mtime >= oldest:
                continue
            with FileLock(folder / LOCK, timeout=0):
                num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                remove(folder)
        except (OSError, Timeout):
            continue
        count, size = count + 1, size + num_bytes
    if count:
        console.print(
            f"deleted from the cache ({kind}), unused for {UNUSED_DAYS} days: {count}, {size / 1e6:,.1f} MB",
            soft_wrap=True,
        )
