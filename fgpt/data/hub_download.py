"""A program that fetches files of a hub repository into the local cache: a request in JSON in, an answer out.

A hub that is silent, or sends a byte a second, would hold whoever waits for it, by threads that cannot be ended. So the
download runs here, in a process that ends when too few bytes come. It imports no fgpt, so that it starts fast.

    python hub_download.py < request.json
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, utils
from huggingface_hub.errors import HfHubHTTPError

CHUNK = 1 << 14
"""Bytes after which a download is written on: the library's own 10 MB would hide that a slow line is at work."""


class Bar(utils.tqdm):
    """The library's progress bar, which tells how many bytes have come."""

    received: dict[int, float] = {}  # noqa: RUF012

    def update(self, n: float | None = 1) -> Any:
        if getattr(self, "unit", None) == "B" and n:
            Bar.received[id(self)] = Bar.received.get(id(self), 0) + n
        return super().update(n)


def fetch(request: dict[str, Any]) -> dict[str, Any]:
    """The folder that then holds the files, and the names of all files of the repository."""
    repo: dict[str, Any] = {"repo_id": request["repo"], "repo_type": request["repo_type"]}
    revision = request["revision"]
    api = huggingface_hub.HfApi()
    info: Any = api.repo_info(**repo, revision=revision, timeout=request["answer_seconds"])
    files = [file.rfilename for file in info.siblings or []]
    folder = huggingface_hub.snapshot_download(
        **repo,
        revision=revision,
        allow_patterns=request["patterns"],
        etag_timeout=request["answer_seconds"],
        tqdm_class=Bar,
    )
    for name in request["optional"]:
        if name not in files:
            absent(repo, name, info.sha)
    return {"folder": str(folder), "files": files}


def absent(repo: dict[str, Any], name: str, commit: str) -> None:
    """Let the library remember in its cache that there is no such file, so that it is not asked for again."""
    with contextlib.suppress(Exception):  # of whatever kind: then it is asked for again
        huggingface_hub.hf_hub_download(**repo, filename=name, revision=commit)


def failure(err: Exception) -> dict[str, Any]:
    """What went wrong: the names of its classes, the hub's status, the first line of the message."""
    cause = err if isinstance(err, HfHubHTTPError) else err.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    shown = cause if isinstance(cause, Exception) and not str(err).strip() else err
    line = (str(shown).strip().splitlines() or [""])[0]
    return {"error": [cls.__name__ for cls in type(err).__mro__], "status": status, "line": line}


def stored(repo: str, repo_type: str) -> int:
    """Bytes of a repository in the cache, those of unfinished files too: also what another process fetches."""
    name = "--".join([f"{repo_type}s", *repo.split("/")])
    total = 0
    for path in (Path(constants.HF_HUB_CACHE) / name / "blobs").glob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # it has just been renamed
            continue
    return total


def watch(worker: threading.Thread, request: dict[str, Any]) -> bool:
    """Wait for the worker; False where fewer than the least bytes came in the seconds that they have."""
    parent = os.getppid()
    mark, since = 0.0, time.monotonic()
    before = stored(request["repo"], request["repo_type"])
    while worker.is_alive():
        worker.join(0.2)
        if os.getppid() != parent:  # nobody waits any more
            os._exit(1)
        come = max([stored(request["repo"], request["repo_type"]) - before, *list(Bar.received.values())])
        if come >= mark + request["least_bytes"]:
            mark, since = come, time.monotonic()
        elif time.monotonic() - since > request["seconds"]:
            return False
    return True


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    request = json.load(sys.stdin)
    utils.logging.set_verbosity_error()
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    answers: list[dict[str, Any]] = []

    def work() -> None:
        try:
            answers.append(fetch(request))
        except Exception as err:
            answers.append(failure(err))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    if not watch(worker, request):
        line = f"fewer than {request['least_bytes']:,} bytes in {request['seconds']:g} seconds"
        answers = [{"error": ["Silent"], "status": None, "line": line}]
    print(json.dumps(answers[0]), flush=True)
    os._exit(0)  # threads that still wait for the hub are not waited for


if __name__ == "__main__":
    main()
