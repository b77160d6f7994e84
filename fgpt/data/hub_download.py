"""A program that downloads files of a hub repository into the local cache: JSON request on stdin, response on stdout.

A hub that does not answer, or sends a byte per second, would block the caller in threads that cannot be stopped. So the
download runs in this process, which ends if too few bytes arrive. It does not import fgpt, so that it starts fast.

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
"""Bytes after which progress is reported: with the library's own 10 MB, a slow connection would look stalled."""


class CountingBar(utils.tqdm):
    """The library's progress bar, which also counts the bytes received."""

    received: dict[int, float] = {}  # noqa: RUF012

    def update(self, n: float | None = 1) -> Any:
        if getattr(self, "unit", None) == "B" and n:
            CountingBar.received[id(self)] = CountingBar.received.get(id(self), 0) + n
        return super().update(n)


def fetch(request: dict[str, Any]) -> dict[str, Any]:
    """Download the files; the response holds their folder and the names of all files of the repository."""
    repo: dict[str, Any] = {"repo_id": request["repo"], "repo_type": request["repo_type"]}
    revision = request["revision"]
    api = huggingface_hub.HfApi()
    info: Any = api.repo_info(**repo, revision=revision, timeout=request["response_seconds"])
    files = [file.rfilename for file in info.siblings or []]
    folder = huggingface_hub.snapshot_download(
        **repo,
        revision=revision,
        allow_patterns=request["patterns"],
        etag_timeout=request["response_seconds"],
        tqdm_class=CountingBar,
    )
    for name in request["optional"]:
        if name not in files:
            record_missing(repo, name, info.sha)
    return {"folder": str(folder), "files": files}


def record_missing(repo: dict[str, Any], name: str, commit: str) -> None:
    """Let the library record in its cache that a file does not exist, so that it is not requested again."""
    with contextlib.suppress(Exception):  # whatever happens, the file is only requested again
        huggingface_hub.hf_hub_download(**repo, filename=name, revision=commit)


def failure(err: Exception) -> dict[str, Any]:
    """An error as a response: the names of its classes, the HTTP status, the first line of its message."""
    cause = err if isinstance(err, HfHubHTTPError) else err.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    shown = cause if isinstance(cause, Exception) and not str(err).strip() else err
    line = (str(shown).strip().splitlines() or [""])[0]
    return {"error": [cls.__name__ for cls in type(err).__mro__], "status": status, "line": line}


def cached_bytes(repo: str, repo_type: str) -> int:
    """Bytes of a repository in the cache, unfinished files and those of other processes included."""
    name = "--".join([f"{repo_type}s", *repo.split("/")])
    total = 0
    for path in (Path(constants.HF_HUB_CACHE) / name / "blobs").glob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # it has just been renamed
            continue
    return total


def watch(worker: threading.Thread, request: dict[str, Any]) -> bool:
    """Wait for the worker. False if fewer than `min_bytes` arrived in `stall_seconds`."""
    parent = os.getppid()
    checkpoint, checkpoint_time = 0.0, time.monotonic()
    initial = cached_bytes(request["repo"], request["repo_type"])
    while worker.is_alive():
        worker.join(0.2)
        if os.getppid() != parent:  # the caller has ended
            os._exit(1)
        in_cache = cached_bytes(request["repo"], request["repo_type"]) - initial
        received = max([in_cache, *list(CountingBar.received.values())])
        if received >= checkpoint + request["min_bytes"]:
            checkpoint, checkpoint_time = received, time.monotonic()
        elif time.monotonic() - checkpoint_time > request["stall_seconds"]:
            return False
    return True


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    request = json.load(sys.stdin)
    utils.logging.set_verbosity_error()
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    responses: list[dict[str, Any]] = []

    def work() -> None:
        try:
            responses.append(fetch(request))
        except Exception as err:
            responses.append(failure(err))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    if not watch(worker, request):
        line = f"fewer than {request['min_bytes']:,} bytes in {request['stall_seconds']:g} seconds"
        responses = [{"error": ["Stalled"], "status": None, "line": line}]
    print(json.dumps(responses[0]), flush=True)
    os._exit(0)  # without waiting for threads that still wait for the hub


if __name__ == "__main__":
    main()
