"""Datasets of folders and of the hub, cached, absent and gated."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from builders import ROOT
from builders.datasets import JSON_ROWS, ROWS, load_rows_elsewhere

from fgpt.data.prompt_templates import InstructionRow


@pytest.mark.slow
def test_folder_in_the_hubs_layout(tmp_path: Path):
    data = tmp_path / "mine" / "data"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(JSON_ROWS), data / f"{split}-00000-of-00001.parquet")
    assert load_rows_elsewhere(tmp_path, str(data.parent), HF_HUB_OFFLINE="1") == str(ROWS)
    (tmp_path / "void").mkdir()
    error = load_rows_elsewhere(tmp_path, str(tmp_path / "void"), HF_HUB_OFFLINE="1")
    assert error.startswith(f"InputError {tmp_path / 'void'}: expected a folder in the layout of a dataset: ")
    assert "\n" not in error


def test_the_hub_from_the_cache_alone(tmp_path: Path):
    """What was fetched once is read with the network away."""
    snapshot = tmp_path / "hub" / "datasets--databricks--databricks-dolly-15k" / "snapshots" / "abc"
    blob, ref = snapshot.parent.parent / "blobs" / "123", snapshot.parent.parent / "refs" / "main"
    for folder in (snapshot, blob.parent, ref.parent):
        folder.mkdir(parents=True)
    ref.write_text("abc")
    blob.write_text(json.dumps({"instruction": "a", "context": "b", "response": "c", "category": "d"}))
    (snapshot / "databricks-dolly-15k.jsonl").symlink_to("../../blobs/123")
    assert load_rows_elsewhere(tmp_path, "dolly", HF_HUB_OFFLINE="1") == str([InstructionRow("a", "b", "c")])


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_the_hub_is_away(tmp_path: Path, env: dict[str, str]):
    """Nothing cached: one line that says what to do instead, and soon (`elsewhere` allows 15 s; alone it takes 1)."""
    error = load_rows_elsewhere(tmp_path, "alpaca", **env)
    assert error.startswith("InputError the hub gave no 'alpaca' (")
    assert "give a file instead" in error
    assert "lora-nano" in error
    assert "\n" not in error


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub of one dataset, GAIR/lima, to be read with the token "hf_good"."""
    content = json.dumps({"conversations": ["hello", "good day"], "source": "x"}).encode()

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            info = self.path.startswith("/api/datasets/GAIR/lima")
            body = json.dumps({"id": "GAIR/lima", "sha": "a" * 40, "siblings": [{"rfilename": "train.jsonl"}]}).encode()
            if "/tree/" in self.path:
                body = json.dumps(
                    [{"type": "file", "path": "train.jsonl", "size": len(content), "oid": "b" * 40}]
                ).encode()
            allowed = info or self.headers.get("Authorization") == "Bearer hf_good"
            body = body if info else content if allowed else b""
            self.send_response(200 if allowed else 401)
            if not allowed:
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"0123456789"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer  # noqa: N815 (the library's names)

        def log_message(self, format: str, *args: object):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_a_gated_dataset(tmp_path: Path, hub: str):
    error = load_rows_elsewhere(tmp_path, "lima", HF_ENDPOINT=hub)
    assert error.startswith(
        "InputError the hub refuses GAIR/lima (HTTP 401): accept its terms at https://huggingface.co/"
    )
    assert "\n" not in error
    assert load_rows_elsewhere(tmp_path, "lima", HF_ENDPOINT=hub, HF_TOKEN="hf_good") == str(
        [InstructionRow("hello", "", "good day")]
    )
    assert load_rows_elsewhere(tmp_path, "lima", HF_HUB_OFFLINE="1") == str([InstructionRow("hello", "", "good day")])


def test_importing_is_light():
    code = "import sys, fgpt.data.instruction_datasets; print({'datasets', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr
