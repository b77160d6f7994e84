"""Options of a training that takes seconds, and its one line of error."""

import pytest

SHORT_TRAINING = ["--steps", "6", "--micro-batch-size", "2", "--compare-prompts", "4", "--max-new-tokens", "24"]
"""Enough to train, save and compare in seconds."""


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr().err.strip().splitlines()
    assert output[-1].startswith("error: ")
    assert len(output) == 1, output
    return output[0]
