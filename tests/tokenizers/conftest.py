"""Folders of tokenizers."""

from pathlib import Path

import pytest
from builders.tokenizer_kinds import KINDS


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: make(root / f"{i}") for i, (name, make) in enumerate(KINDS.items())}
