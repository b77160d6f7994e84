"""Models and datasets of the hub: what the cache lacks is fetched, and a hub that stands still is not waited for."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from builders import same, tiny
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import fgpt
from fgpt.data import hub_files, instruction_datasets
from fgpt.data.instruction_datasets import InstructionDataset
from fgpt.io import models
from fgpt.tokenizers.tokenizer_files import FILES

COMMIT = "a" * 40
PARAMS = tiny(vocab_size=4096, n_layer=1)


class FakeHub:
    """A hub on this machine. `files` are those of its one repository, whatever it is called; `asked` lists the paths of
    all requests; `slow` says of a request how it is answered: None at once, or else (bytes at a time, seconds between).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.slow: Callable[[str, str], tuple[int, float] | None] = lambda method, path: None
        self.done = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                fake.asked.append(self.path)
                body = fake.body(self.path)
                content = body or b""
                head = f"HTTP/1.1 {404 if body is None else 200} x\r\nContent-Length: {len(content)}\r\n"
                head += f'ETag: "{hashlib.sha1(content).hexdigest()}"\r\nX-Repo-Commit: {COMMIT}\r\n'
                head += "Connection: close\r\n" + ("X-Error-Code: EntryNotFound\r\n" if body is None else "") + "\r\n"
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
        path = path.partition("?")[0]
        if "/tree/" in path:
            rows = [{"type": "file", "path": n, "size": len(b), "oid": "b" * 40} for n, b in self.files.items()]
            return json.dumps(rows).encode()
        if path.startswith("/api/"):
            return json.dumps(
                {"id": "me/it", "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files]}
            ).encode()
        return self.files.get(path.partition("/resolve/")[2].partition("/")[2])

    def stop(self) -> None:
        self.done.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub whose cache is empty."""
    fake = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{fake.server.server_port}")
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield fake
    fake.stop()


def model(folder: Path, shards: int = 1) -> dict[str, bytes]:
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


def cache(tmp_path: Path, files: dict[str, bytes], kind: str = "models", repo: str = "me--it") -> Path:
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


def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nobody answers."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


# -------------------------------------------------------------------------------------------------- a part of a model

PARTS: dict[str, tuple[int, Callable[[str], bool]]] = {
    "the config": (1, lambda name: name == "config.json"),
    "the tokenizer": (1, lambda name: name in FILES),
    "the weights": (1, lambda name: name == "model.safetensors"),
    "one shard": (3, lambda name: name in ("config.json", "model-00002-of-00003.safetensors")),
    "the index": (3, lambda name: not name.startswith("model-")),
    "two of three shards": (3, lambda name: "00002" not in name),
    "all but the tokenizer": (1, lambda name: name not in FILES),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_the_cache_lacks_is_fetched(part: str, tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    shards, has = PARTS[part]
    fake.files = model(tmp_path / "model", shards)
    cache(tmp_path, {name: data for name, data in fake.files.items() if has(name)})
    expected = fgpt.tokenizer("nano").encode("so it is")
    assert fgpt.tokenizer("me/it").encode("so it is") == expected
    assert same(fgpt.load("me/it"), PARAMS)
    fetched = {path.rpartition("/")[2] for path in fake.asked if "/resolve/" in path}
    assert not [name for name in fetched & fake.files.keys() if has(name)]  # what was there is not fetched again
    fake.asked.clear()
    away(monkeypatch)
    assert same(fgpt.load("me/it"), PARAMS)
    assert fgpt.tokenizer("me/it").encode("so it is") == expected
    assert not fake.asked


LACKING = {
    "the config": r"without model\.safetensors,",
    "the tokenizer": r"without config\.json, model\.safetensors,",
    "the weights": r"without config\.json,",
    "one shard": r"without model\.safetensors,",
    "the index": r"without (model-0000\d-of-00003\.safetensors(, )?){3},",
    "two of three shards": r"without model-00002-of-00003\.safetensors,",
}


@pytest.mark.parametrize("part", LACKING)
def test_what_cannot_be_fetched_is_named(part: str, tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    shards, has = PARTS[part]
    cache(tmp_path, {name: data for name, data in model(tmp_path / "model", shards).items() if has(name)})
    away(monkeypatch)
    with pytest.raises(fgpt.InputError, match=LACKING[part]) as caught:
        fgpt.load("me/it")
    assert "holds only a part of the model 'me/it'" in str(caught.value)
    assert "the hub cannot be reached (ConnectError)" in str(caught.value)
    assert "pickled" not in str(caught.value)


def test_a_tokenizer_is_not_needed_for_the_weights(tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    """Nor is it guessed: GPT-2's own would do for a model of its size, and may be another than the repository's."""
    files = model(tmp_path / "model")
    cache(tmp_path, {name: data for name, data in files.items() if name not in FILES})
    away(monkeypatch)
    assert same(fgpt.load("me/it"), PARAMS)
    with pytest.raises(fgpt.InputError, match=r"only a part .* without tokenizer\.json, .* cannot be reached"):
        fgpt.tokenizer("me/it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert same(fgpt.load("me/it"), PARAMS)


def test_a_repository_without_a_tokenizer_is_asked_once(tmp_path: Path, fake: FakeHub):
    fake.files = {name: data for name, data in model(tmp_path / "model").items() if name not in FILES}
    fgpt.load("me/it")
    fake.asked.clear()
    fgpt.load("me/it")
    assert not fake.asked


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("pytorch_model.bin", "pickled weights may run any code and are not read: convert them"),
        ("model.Q4_0.gguf", "GGUF files: download one of them"),
        ("training_args.bin", "nor other weights that are read here"),
    ],
)
def test_a_repository_without_safetensors(other: str, says: str, tmp_path: Path, fake: FakeHub):
    """Pickles are spoken of where there are some."""
    files = model(tmp_path / "model")
    fake.files = {"config.json": files["config.json"], other: b"x"}
    with pytest.raises(fgpt.InputError, match=rf"the hub's me/it has no model\.safetensors.*{says}"):
        fgpt.load("me/it")
    assert not [path for path in fake.asked if path.endswith(other)]
    local = tmp_path / "local"
    local.mkdir()
    (local / "config.json").write_bytes(files["config.json"])
    with pytest.raises(fgpt.InputError, match=r"local has no model\.safetensors, nor other weights"):
        fgpt.load(str(local))


def test_a_link_into_nothing_is_fetched_again(tmp_path: Path, fake: FakeHub):
    """A cache whose blob was deleted to make room."""
    fake.files = model(tmp_path / "model")
    folder = cache(tmp_path, fake.files)
    (folder / "model.safetensors").resolve().unlink()
    assert same(fgpt.load("me/it"), PARAMS)


# ------------------------------------------------------------------------------------------------------------- datasets


def dataset(monkeypatch: pytest.MonkeyPatch, names: list[str], pattern: str) -> dict[str, bytes]:
    monkeypatch.setitem(instruction_datasets.HUB_DATASETS, "made", InstructionDataset("me/it", pattern))
    return {name: json.dumps({"instruction": name, "output": "x"}).encode() for name in names}


NUMBERED = [f"data/train-{i:05}-of-00003.jsonl" for i in range(3)]
HASHED = [f"data/train-{i:05}-of-00002-{h}.jsonl" for i, h in enumerate(("a1b2", "c3d4"))]


@pytest.mark.parametrize("names", [NUMBERED, HASHED], ids=["numbered", "hashed"])
def test_a_dataset_of_which_the_cache_holds_a_part(
    names: list[str], tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
):
    fake.files = dataset(monkeypatch, [*names, "README.md"], "data/train-*.jsonl")
    cache(tmp_path, {names[1]: fake.files[names[1]]}, "datasets")
    there = monkeypatch.context()
    with there as patch:
        away(patch)
        with pytest.raises(fgpt.InputError, match=rf"gave no 'made' beyond the part .* 1 of {len(names)} files"):
            instruction_datasets.load_rows("made")
    assert [row.instruction for row in instruction_datasets.load_rows("made")] == names
    fake.asked.clear()
    assert [row.instruction for row in instruction_datasets.load_rows("made")] == names
    assert not fake.asked


def test_a_dataset_of_which_a_part_is_wanted(tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    fake.files = dataset(monkeypatch, NUMBERED, "data/train-00000-of-*.jsonl")
    cache(tmp_path, {NUMBERED[0]: fake.files[NUMBERED[0]]}, "datasets")
    assert len(instruction_datasets.load_rows("made")) == 1
    assert not fake.asked


# -------------------------------------------------------------------------------------------- a hub that stands still

SLOW: dict[str, Callable[[str, str], tuple[int, float] | None]] = {
    "is silent": lambda method, path: (1, 99.0),
    "is silent about its files": lambda method, path: (1, 99.0) if "/tree/" in path else None,
    "is silent about one file": lambda method, path: (1, 99.0) if method == "HEAD" else None,
    "sends no weights": lambda method, path: (300, 0.1) if path.endswith("safetensors") and method == "GET" else None,
    "sends a byte at a time": lambda method, path: (1, 0.1),
}


@pytest.mark.parametrize("what", SLOW)
def test_a_hub_that_stands_still_is_not_waited_for(
    what: str, tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
):
    fake.files, fake.slow = model(tmp_path / "model"), SLOW[what]
    monkeypatch.setattr(hub_files, "RESPONSE_SECONDS", 0.5)
    monkeypatch.setattr(hub_files, "STALL_SECONDS", 1.0)
    begin = time.perf_counter()
    with pytest.raises(fgpt.InputError, match="the hub cannot be reached") as caught:
        fgpt.load("me/it")
    assert time.perf_counter() - begin < 8  # of which a second or two are the process'
    reason = "ReadTimeout" if what == "is silent" else "fewer than 30,000 bytes in 1 seconds"
    assert f"({reason})" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_dataset_that_stands_still_is_not_waited_for(fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    fake.files, fake.slow = dataset(monkeypatch, NUMBERED, "data/train-*.jsonl"), SLOW["sends a byte at a time"]
    monkeypatch.setattr(hub_files, "STALL_SECONDS", 1.0)
    with pytest.raises(
        fgpt.InputError, match=r"the hub gave no 'made' \(Stalled: fewer than 30,000 bytes in 1 seconds\)"
    ):
        instruction_datasets.load_rows("made")


def test_a_slow_line_is_waited_for(tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    """A download that takes longer than the silence that is borne, at three times the least rate."""
    monkeypatch.setattr(hub_files, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(hub_files, "MIN_BYTES", 20_000)
    fake.files = model(tmp_path / "model")
    assert len(fake.files["model.safetensors"]) > 200_000
    fake.slow = lambda method, path: (6_000, 0.1) if path.endswith("safetensors") and method == "GET" else None
    begin = time.perf_counter()
    assert same(fgpt.load("me/it"), PARAMS)
    assert time.perf_counter() - begin > 3


def test_a_user_may_wait_longer(tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    """By the library's own variable."""
    monkeypatch.setattr(hub_files, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 3)
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "3")
    fake.files, fake.slow = model(tmp_path / "model"), SLOW["sends no weights"]
    with pytest.raises(fgpt.InputError, match="in 3 seconds"):
        fgpt.load("me/it")
    assert models._missing_files(None) == ["config.json", "model.safetensors"]
