"""A hub on this machine to which repositories are pushed."""

import base64
import json
from typing import Any

from builders.hub import FakeHub

TOKEN = "hf_of_a_test"
LARGE = (".safetensors", ".gguf")
"""Files whose contents are uploaded before the commit, and named in it by their hash."""


class UploadHub(FakeHub):
    """`repos` are the requests that made a repository; `commits` the files of each commit, by repository; `objects`
    what was uploaded before them, by hash. Requests of a path with `fails_at` in it are refused with `status`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.repos: list[dict[str, Any]] = []
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.objects: dict[str, bytes] = {}
        self.fails_at, self.status = "nowhere", 500
        self.refuse = lambda path: (404, "RepoNotFound")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def receive(self, path: str, body: bytes, authorization: str | None) -> tuple[int, Any]:
        if self.fails_at in path:
            return self.status, {"error": "it fails"}
        if path.startswith("/objects/"):
            self.objects[path.removeprefix("/objects/")] = body
            return 200, {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid user token."}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            self.repos.append(json.loads(body))
            return 200, {"url": f"{self.url}/{self.repos[-1]['organization']}/{self.repos[-1]['name']}"}
        if "/preupload/" in path:
            return 200, {"files": [self._mode(each["path"]) for each in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(each) for each in json.loads(body)["objects"]]}
        if "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            self.commits.append((repo, dict(self._files(body))))
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/x", "commitOid": "c" * 40}
        return 404, {}

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(LARGE) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _place(self, each: dict[str, Any]) -> dict[str, Any]:
        return each | {"actions": {"upload": {"href": f"{self.url}/objects/{each['oid']}", "header": {}}}}

    def _files(self, body: bytes) -> list[tuple[str, bytes]]:
        """The files of a commit: as they are, or by the hash of what was uploaded."""
        lines = [json.loads(line) for line in body.splitlines()]
        files = [(x["value"]["path"], base64.b64decode(x["value"]["content"])) for x in lines if x["key"] == "file"]
        large = [(x["value"]["path"], self.objects[x["value"]["oid"]]) for x in lines if x["key"] == "lfsFile"]
        return files + large
