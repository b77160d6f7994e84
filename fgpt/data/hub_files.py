"""Files of hub repositories: what the local cache holds of them, and what is fetched into it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fgpt.errors import one_line

ANSWER_SECONDS = 5.0
"""What the hub has to answer a first question. Without this the libraries retry for half a minute, or wait for ever."""
SILENT_SECONDS, LEAST_BYTES = 30.0, 30_000
"""A download ends where fewer bytes than these come in so many seconds: 1 KB/s. Whoever sets HF_HUB_DOWNLOAD_TIMEOUT
higher waits as long."""


class Repo(NamedTuple):
    """A repository on the hub, and the patterns of the files that are wanted of it."""

    name: str
    kind: str
    """"model" or "dataset"."""
    patterns: Sequence[str]
    revision: str | None = None


class Cached(NamedTuple):
    """What the local cache holds of a repository: its folder, and whether a file is known to be missing."""

    folder: Path | None
    partial: bool = False


class Fetched(NamedTuple):
    """The folder of a repository's files, and the names of all that it has."""

    folder: Path
    files: list[str]


class HubError(Exception):
    """The hub cannot be reached, refuses, or sends nothing: the names of the error's classes, its status, its line."""

    def __init__(self, kinds: Sequence[str], status: int | None, line: str):
        super().__init__(line)
        self.kinds, self.status, self.line = kinds, status, one_line(line)[:300]

    @property
    def reason(self) -> str:
        """In a few words, for a line of ours."""
        return self.line if self.kinds[0] == "Silent" else self.kinds[0]


def cached(repo: Repo) -> Cached:
    """What the cache holds of `repo`, without a question to the hub.

    Raises the library's HFValidationError for what is no name of a repository.
    """
    from huggingface_hub import snapshot_download  # here, because importing it takes longer than importing fgpt
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo.name,
            repo_type=repo.kind,
            revision=repo.revision,
            allow_patterns=list(repo.patterns),
            local_files_only=True,
        )
    except LocalEntryNotFoundError as err:  # it says where a folder is that lacks a file
        folder = getattr(err, "snapshot_path", None)
        return Cached(folder and Path(folder), partial=True)
    return Cached(Path(folder))


def is_known(repo: Repo, file: str) -> bool:
    """Whether the cache has a file of `repo`, or knows that there is none."""
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(repo.name, file, revision=repo.revision, repo_type=repo.kind) is not None


def is_offline() -> bool:
    """Whether the user has forbidden all questions to the hub, by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def fetch(repo: Repo, optional: Sequence[str] = ()) -> Fetched:
    """The files of `repo`, all of them in the cache. It then knows, too, which of the `optional` ones do not exist.

    Raises HubError where the hub cannot be reached, refuses, or sends too little.
    """
    from huggingface_hub import constants

    answer_seconds, seconds = ANSWER_SECONDS, SILENT_SECONDS
    if "HF_HUB_ETAG_TIMEOUT" in os.environ:
        answer_seconds = float(constants.HF_HUB_ETAG_TIMEOUT)
    if "HF_HUB_DOWNLOAD_TIMEOUT" in os.environ:
        seconds = max(seconds, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    request = {
        "repo": repo.name,
        "repo_type": repo.kind,
        "revision": repo.revision,
        "patterns": list(repo.patterns),
        "optional": list(optional),
        "answer_seconds": answer_seconds,
        "seconds": seconds,
        "least_bytes": LEAST_BYTES,
    }
    program = [sys.executable, "-P", str(Path(__file__).with_name("hub_download.py"))]  # -P: no neighbor is imported
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        answered, _ = process.communicate(json.dumps(request))
    except BaseException:
        process.kill()
        raise
    try:
        answer = json.loads(answered)
    except ValueError:
        raise HubError(["Ended"], None, f"the download ended with exit code {process.returncode}") from None
    if "error" in answer:
        raise HubError(answer["error"], answer["status"], answer["line"])
    return Fetched(Path(answer["folder"]), answer["files"])
