"""What every test has: Hypothesis without deadlines, shared data, a tiny model, a trap for the merged weight."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest
from builders import ROOT, SharedData, tiny
from builders.checks import Patch, loaded_module
from builders.hub import FakeHub
from huggingface_hub import constants
from hypothesis import settings
from transformers.utils.logging import disable_progress_bar

import fgpt
from fgpt.kernels import quantized_linear as kernel
from fgpt.weights import dense

# A shell has what it starts in the background ignore SIGINT, and so would the processes that tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("fgpt", deadline=None, max_examples=20)
settings.load_profile("fgpt")
disable_progress_bar()
# Processes that compile inherit these. Without them each first compiles six programs, to see whether g++ knows the
# vector instructions that the CPU has, and starts a pool of compilers, which imports torch once more.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> SharedData:
    """Finds a file or folder of the development data beside the repository; skips the test where it is absent."""
    folder = ROOT.parent / "shared" / "data"

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"needs {name} in ../shared/data, which is not beside this checkout")
        return folder / name

    return find


@pytest.fixture
def gpt() -> fgpt.GPT:
    return tiny()


@pytest.fixture
def factored(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Nothing may form a merged weight: `dense` raises, until the returned function is called."""

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("dense was called on the factored path")

    for name, module in list(sys.modules.items()):  # whoever has imported the name has it refused
        if name.split(".")[0] in ("fgpt", "experiments") and getattr(module, "dense", None) is dense:
            monkeypatch.setattr(module, "dense", refuse)
    return monkeypatch.undo


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """`patch(module, name, change)`: what the module calls `name` is `change` of what it was."""

    def put(where: str, name: str, change: Callable[[Any], Any]) -> None:
        monkeypatch.setattr(loaded_module(where), name, change(getattr(loaded_module(where), name)))

    return put


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


@pytest.fixture(scope="module")
def exact_derivatives() -> Iterator[None]:
    """As on a CPU that does not multiply bf16."""
    with mock.patch.object(kernel, "HAS_BF16_MATMUL", False):
        yield
