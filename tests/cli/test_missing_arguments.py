"""An argument that is missing: one line names it and says what it is."""

import importlib.metadata
import shlex

import pytest

import fgpt
from fgpt.cli.main import main


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("generate lora-nano", "expected PROMPT (The instruction); fgpt generate --help"),
        ("generate", "expected RUN (The name of a run, or its folder) and PROMPT (The instruction); fgpt generate"),
        ("classify", "expected RUN (The name of a run, or its folder); fgpt classify --help"),
        ("eval text", "expected FILE (A UTF-8 file, or - for standard input); fgpt eval text --help"),
    ],
)
def test_a_missing_argument(typed: str, expected: str, capsys: pytest.CaptureFixture[str]):
    assert main(shlex.split(typed)) == 2
    assert capsys.readouterr().err.startswith(f"error: {expected}")


def test_the_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fgpt {importlib.metadata.version('fgpt')}\n"


def test_a_gguf_file_that_is_not_there():
    with pytest.raises(fgpt.InputError, match=r"^nosuch\.gguf: no such file$"):
        fgpt.load("nosuch.gguf")
