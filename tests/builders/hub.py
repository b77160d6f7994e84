"""A hub on this machine, and a cache of it."""

import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import fgpt
from builders import tiny
from fgpt.data import instruction_datasets
from fgpt.data.instruction_datasets import InstructionDataset

COMMIT = "a" * 40
PARAMS = tiny(vocab_size=4096, n_layer=1)


class FakeHub:
    """A hub on this machine. `files` are those of its one repository, whatever it is called; `asked` lists the paths of
    all requests; `slow` says of a request how it is answered: None at once, or else (bytes at a time, seconds between);
    `refuse` says of a path whether it is refused: None if not, or else (HTTP status, the hub's error code).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.slow: Callable[[str, str], tuple[int, float] | None] = lambda method, path: None
        self.refuse: Callable[[str], tuple[int, str] | None] = lambda path: None
        self.done = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                fake.asked.append(self.path)
                refused = fake.refuse(self.path)
                body = None if refused else fake.body(self.path)
                status, code = refused or ((404, "EntryNotFound") if body is None else (200, ""))
                content = body or b""
                head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(content)}\r\n"
                head += f'ETag: "{hashlib.sha1(content).hexdigest()}"\r\nX-Repo-Commit: {COMMIT}\r\n'
                head += "Connection: close\r\n" + (f"X-Error-Code: {code}\r\n" if code else "") + "\r\n"
                whole = head.encode() + (content if self.command == "GET" else b"")
                pace = fake.slow(self.command, self.path)
                self.close_connection = True
                if pace is None:
                    self.wfile.write(whole)
                    return
                size, seconds = pace
                for at in range(0, len(whole), size):
                    if fake.done.wait(seconds):
                        return
                    self.wfile.write(whole[at : at + size])

            do_GET = do_HEAD = answer  # noqa: N815 (the library's names)

            def receive(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                status, answer = fake.receive(self.path, body, self.headers.get("Authorization"))
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PUT = receive  # noqa: N815

            def log_message(self, format: str, *args: object):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any):  # who asked has gone
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def body(self, path: str) -> bytes | None:
        path, _, query = path.partition("?")
        if "/tree/" in path:
            folder = path.partition("/tree/")[2].partition("/")[2]
            return json.dumps(self.tree(folder, is_deep="recursive=false" not in query.lower())).encode()
        if path.startswith("/api/"):
            return json.dumps(
                {"id": "me/it", "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files]}
            ).encode()
        return self.files.get(path.partition("/resolve/")[2].partition("/")[2])

    def receive(self, path: str, body: bytes, authorization: str | None) -> tuple[int, Any]:
        """The answer to what is uploaded: a hub that takes nothing."""
        return 404, {}

    def tree(self, folder: str, *, is_deep: bool) -> list[dict[str, Any]]:
        """The entries of a folder, and below it if deep."""
        prefix = folder + "/" if folder else ""
        rows: dict[str, dict[str, Any]] = {}
        for name, content in self.files.items():
            if not name.startswith(prefix):
                continue
            child = prefix + name.removeprefix(prefix).partition("/")[0]
            if is_deep or child == name:
                rows[name] = {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
            else:
                rows[child] = {"type": "directory", "path": child, "size": 0, "oid": "b" * 40}
        return list(rows.values())

    def stop(self) -> None:
        self.done.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def fake_model(folder: Path, shards: int = 1) -> dict[str, bytes]:
    """The files of a model with its tokenizer."""
    fgpt.save(PARAMS, folder, like="nano")
    if shards > 1:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = {
            name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))
        }
        for file in set(names.values()):
            save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cache_of(tmp_path: Path, files: dict[str, bytes], kind: str = "models", repo: str = "me--it") -> Path:
    """Put files into the cache as the library does, and give their folder."""
    store = tmp_path / "cache" / f"{kind}--{repo}"
    folder = store / "snapshots" / COMMIT
    for name, data in files.items():
        blob = store / "blobs" / hashlib.sha1(data).hexdigest()
        for path in (blob, folder / name):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        (folder / name).symlink_to(blob)
    (store / "refs").mkdir(exist_ok=True)
    (store / "refs" / "main").write_text(COMMIT)
    return folder


def hub_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nobody answers."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def fake_dataset(monkeypatch: pytest.MonkeyPatch, names: list[str], pattern: str) -> dict[str, bytes]:
    monkeypatch.setitem(instruction_datasets.HUB_DATASETS, "made", InstructionDataset("me/it", pattern))
    return {name: json.dumps({"instruction": name, "output": "x"}).encode() for name in names}


NUMBERED = [f"data/train-{i:05}-of-00003.jsonl" for i in range(3)]
