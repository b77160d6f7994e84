"""Corrupt files are read within limits of time and memory, and counted."""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgpt.errors import InputError

COUNTS = {
    "safetensors": 190,
    "trees": 220,
    "shards": 70,
    "gguf": 250,
    "peft": 280,
    "configs": 200,
    "tokenizers": 200,
    "datasets": 240,
    "bitsandbytes": 80,
}
"""How many files of each kind are corrupt, at least."""
TRIED: Counter[str] = Counter()
LOADED: Counter[str] = Counter()
AGAIN = "read another way"
"""No kind: the file has been counted."""
SECONDS, ROOM = 5.0, 2 << 30


class HangError(BaseException):
    """What no `except Exception` takes for an error of the file."""


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def assert_enough(kind: str, tests: int = 1) -> None:
    """Asserts that a test has tried its share of the files of a kind; and that some were loaded, and most were not."""
    assert TRIED[kind] >= COUNTS[kind] / tests
    assert 0 < LOADED[kind] < TRIED[kind] * 0.6


def outcome_of(kind: str, path: Path, read: Callable[[], Any]) -> Any:
    """What `read` makes of a corrupt file; None where it says in one line that `path` cannot be read."""
    TRIED[kind] += 1
    with time_limit():
        try:
            found = read()
            LOADED[kind] += 1
            return found
        except InputError as err:
            output = str(err)
    assert output.strip()
    assert "\n" not in output
    assert output.isprintable(), output
    assert len(output) < 2000
    assert str(path) in output
    return None


def assert_same_reading(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Asserts the same names and shapes, and bit by bit the same numbers, what is no number included."""
    assert got.keys() == expected.keys()
    for name, x in got.items():
        assert x.shape == expected[name].shape, name
        assert x.dtype == expected[name].dtype, name
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


LLAMA: dict[str, Any] = {
    "norm_type": "rms",
    "gated_mlp": True,
    "rotary_dim": 8,
    "tie_word_embeddings": False,
    "activation": "silu",
    "biases": frozenset(),
}
