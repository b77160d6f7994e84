"""A browser shows every section and runs nothing."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from builders.pages import chromium
from builders.reports import EVIL

from fgpt.cli import report

SECTIONS = ["training", "comparison", "evaluation", "config", "environment", "reproduce"]


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
    assert parsed.ids == SECTIONS
    assert "CONSOLE" not in process.stderr
    assert parsed.fetched == [f"#{name}" for name in SECTIONS]
    assert not parsed.tags & {"link", "iframe", "object", "img", "form"}
    assert process.stdout.count("<script") == 1  # the one that sorts tables
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
