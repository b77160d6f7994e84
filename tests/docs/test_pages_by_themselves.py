"""The pages in the folders of docs/ run from top to bottom, each by itself: Python, and the commands of `fgpt`."""

import re
import shlex
from pathlib import Path

import pytest
from builders import ROOT

from fgpt.cli.main import main

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^( *)```(python|bash)\n(.*?)^ *```$", flags=re.M | re.S)
PAGES = {
    str(path.relative_to(DOCS)): blocks
    for folder in ("start", "guides", "reference")
    for path in sorted((DOCS / folder).glob("*.md"))
    if (blocks := BLOCK.findall(path.read_text(encoding="utf-8")))
}


def run_commands(text: str) -> None:
    """Each line is a command of fgpt, which ends without an error."""
    for line in text.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "fgpt", f"{line!r}: a block of bash has commands of fgpt alone"
        assert main(arguments) == 0, line


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"__name__": "page"}
    for _, language, code in PAGES[page]:
        if language == "python":
            exec(compile(code, page, "exec"), names)
        else:
            run_commands(code)


def test_the_pages_are_read():
    assert {"start/tour.md", "guides/chat.md", "reference/algebra.md"} <= PAGES.keys()
    assert sum(language == "bash" for blocks in PAGES.values() for _, language, _ in blocks) >= 7
