"""A limit on memory for every test of a hostile file, and a model to spoil."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import tiny
from builders.hostile_files import ROOM

import fgpt


@pytest.fixture(autouse=True)
def limited_memory() -> Iterator[None]:
    """So much memory may be mapped on top of what is: an allocation of more fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def saved_gpt(tmp_path: Path) -> Path:
    fgpt.save(tiny(n_layer=1), tmp_path)
    return tmp_path
