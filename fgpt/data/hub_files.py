"""Files of hub repositories: what the local cache holds of them, and downloading the rest into it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fgpt.errors import one_line

RESPONSE_SECONDS = 5.0
"""Time limit for the hub's first response. The library itself would retry for half a minute, or wait forever."""
STALL_SECONDS, MIN_BYTES = 30.0, 30_000
"""A download fails if fewer than MIN_BYTES arrive in STALL_SECONDS (1 KB/s). A longer HF_HUB_DOWNLOAD_TIMEOUT in the
environment is obeyed."""


class Repo(NamedTuple):
    """A repository on the hub, and the patterns of the files needed of it."""

    name: str
    repo_type: str
    """"model" or "dataset"."""
    patterns: Sequence[str]
    revision: str | None = None


class CachedRepo(NamedTuple):
    """What the local cache holds of a repository: its folder, and whether a file is known to be missing."""

    folder: Path | None
    partial: bool = False


class FetchedRepo(NamedTuple):
    """The local folder with a repository's files, and the names of all files in the repository."""

    folder: Path
    files: list[str]


class HubError(Exception):
    """The hub cannot be reached, refuses, or sends too little.

    Args:
        class_names: The names of the error's class and its bases.
        status: The HTTP status, if there is one.
        line: The first line of its message.
    """

    def __init__(self, class_names: Sequence[str], status: int | None, line: str):
        super().__init__(line)
        self.class_names, self.status, self.line = class_names, status, one_line(line)[:300]

    @property
    def reason(self) -> str:
        """The cause in a few words, for a message."""
        return self.line if self.class_names[0] == "Stalled" else self.class_names[0]


def find_cached(repo: Repo) -> CachedRepo:
    """What the cache holds of `repo`, without a request to the hub.

    Raises:
        HFValidationError: from `huggingface_hub`, if the name cannot be that of a repository.
    """
    from huggingface_hub import snapshot_download  # imported here: it takes longer than importing fgpt
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo.name,
            repo_type=repo.repo_type,
            revision=repo.revision,
            allow_patterns=list(repo.patterns),
            local_files_only=True,
        )
    except LocalEntryNotFoundError as err:  # it names the folder of an incomplete snapshot
        folder = getattr(err, "snapshot_path", None)
        return CachedRepo(folder and Path(folder), partial=True)
    return CachedRepo(Path(folder))


def cached_names(repo: Repo) -> list[str] | None:
    """The names of all files of `repo`, by the cache's record of what the hub listed; None if it has none."""
    import huggingface_hub

    list_tree: Any = getattr(huggingface_hub, "get_cached_repo_tree", None)  # of 2.0 and later
    if list_tree is None:
        return None
    try:
        entries = list_tree(repo.name, repo_type=repo.repo_type, revision=repo.revision)
    except Exception:  # whatever is wrong with the record, the hub is asked instead
        return None
    return [str(getattr(entry, "path", entry)) for entry in entries]


def is_known(repo: Repo, file: str) -> bool:
    """Whether the cache has a file of `repo`, or a record that the repository has no such file."""
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(repo.name, file, revision=repo.revision, repo_type=repo.repo_type) is not None


def is_offline() -> bool:
    """Whether the user forbids all requests to the hub, by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def fetch(repo: Repo, optional: Sequence[str] = ()) -> FetchedRepo:
    """Download the files of `repo` that the cache lacks.

    Args:
        repo: The repository and the files needed of it.
        optional: Files that it may have; the cache then records those that do not exist.

    Raises:
        HubError: if the hub cannot be reached, refuses, or sends too little.
    """
    request = {
        "repo": repo.name,
        "repo_type": repo.repo_type,
        "revision": repo.revision,
        "patterns": list(repo.patterns),
        "optional": list(optional),
        **_limits(),
    }
    program = [sys.executable, "-P", str(Path(__file__).with_name("hub_download.py"))]  # -P: imports nothing beside it
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(json.dumps(request))
    except BaseException:
        process.kill()
        raise
    try:
        response = json.loads(output)
    except ValueError:
        raise HubError(["Ended"], None, f"the download ended with exit code {process.returncode}") from None
    if "error" in response:
        raise HubError(response["error"], response["status"], response["line"])
    return FetchedRepo(Path(response["folder"]), response["files"])


def _limits() -> dict[str, float]:
    from huggingface_hub import constants

    response_seconds, stall_seconds = RESPONSE_SECONDS, STALL_SECONDS
    if "HF_HUB_ETAG_TIMEOUT" in os.environ:
        response_seconds = float(constants.HF_HUB_ETAG_TIMEOUT)
    if "HF_HUB_DOWNLOAD_TIMEOUT" in os.environ:
        stall_seconds = max(stall_seconds, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    return {"response_seconds": response_seconds, "stall_seconds": stall_seconds, "min_bytes": MIN_BYTES}
