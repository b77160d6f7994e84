"""A browser shows every section and runs nothing."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from builders.reports import EVIL

from fgpt.cli import report

SECTIONS = ["training", "comparison", "evaluation", "config", "environment", "reproduce"]


def chromium(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page without a screen; stderr has what it logs."""
    if (program := shutil.which("chromium")) is None:
        pytest.skip("no chromium is on the PATH")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    alone = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / '.browser'}")
    logged = ("--enable-logging=stderr", f"--log-net-log={page.parent / 'net.json'}")
    command = [program, *alone, *quiet, *logged, *options, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


class Seen(HTMLParser):
    """A page as the browser has it: what has an id, what is fetched, what is run, and its text."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.ids, self.fetched, self.tags, self.text = [], [], set(), ""
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.add(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.fetched += [
            attributes[name] or "" for name in ("src", "href", "data", "srcset", "action") if name in attributes
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_browser_shows_every_section_and_runs_nothing(finished_run: Path):
    page = report.run(str(finished_run))
    process = chromium(page, "--dump-dom")
    parsed = Seen(process.stdout)
    assert [name for name in parsed.ids if not re.fullmatch("[mp][0-9a-f]{10}", name)] == SECTIONS  # else of plots
    assert "CONSOLE" not in process.stderr
    assert parsed.fetched == [f"#{name}" for name in SECTIONS]
    assert not parsed.tags & {"script", "link", "iframe", "object", "img", "form"}
    assert parsed.text.count(EVIL) == 20  # 10 prompts and as many answers
    assert "<title>lora-nano</title>" in process.stdout
    assert "example.invalid" not in (finished_run / "net.json").read_text(errors="replace")


def test_a_browser_would_have_told(tmp_path: Path):
    """What the test above looks for is there where a page does those things."""
    page = tmp_path / "page.html"
    page.write_text(f"<title>x</title>{EVIL}<script>console.error('seen')</script>")
    process = chromium(page, "--dump-dom")
    assert "CONSOLE" in process.stderr
    assert "<title>it ran</title>" in process.stdout
    assert "example.invalid" in (tmp_path / "net.json").read_text(errors="replace")


def test_a_browser_draws_it(finished_run: Path):
    import matplotlib.image

    picture = finished_run / "shot.png"
    chromium(report.run(str(finished_run)), f"--screenshot={picture}", "--window-size=1200,1400", "--hide-scrollbars")
    drawn: Any = matplotlib.image.imread(picture)[..., :3]
    assert drawn.shape[:2] == (1400, 1200)
    blue: Any = (abs(drawn - [0x1F / 255, 0x6F / 255, 0xB8 / 255]) < 0.1).all(-1)  # the smoothed lines
    assert blue[400:].sum() > 1000
    below = drawn[:, :, 0].std(axis=1) > 0.01
    assert below.mean() > 0.4  # no large part of it is empty
