"""Runs that are compared."""

from pathlib import Path

import pytest
from builders.compare import RUN_NAMES, SHORT_TRAINING

from fgpt.cli.main import main


@pytest.fixture(scope="session")
def compared_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs, compared after training on three prompts each."""
    out = tmp_path_factory.mktemp("runs")
    for name in RUN_NAMES:
        assert main(["train", name, *SHORT_TRAINING, "--out", str(out)]) == 0
    return out
