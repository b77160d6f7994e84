"""The Python of the README and of docs/ runs from top to bottom."""

import re

from builders import ROOT

README = ROOT / "README.md"
OPTIONAL = ("curvlinops", "dattri", "opake", "optree", "posteriors", "torchopt")
"""The packages that docs/interoperability.md shows: no later block needs what a block of theirs defines."""


def blocks() -> list[str]:
    pages = [README, *sorted((ROOT / "docs").glob("*.md"))]
    return [code for page in pages for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)]


def test_there_is_code():
    assert blocks()


def test_the_code_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In one namespace, as a reader would type it in."""
    monkeypatch.chdir(tmp_path)  # it writes files
    names = {"__name__": "readme"}
    for code in blocks():
        try:
            exec(compile(code, str(README), "exec"), names)
        except ModuleNotFoundError as error:
            if str(error.name).split(".")[0] not in OPTIONAL:
                raise
