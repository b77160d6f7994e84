"""An attribution on one page: the answer, the rows that speak for it, and those that speak against it."""

from dataclasses import dataclass
from pathlib import Path

from fgpt.cli.evaluation.compare.html import render
from fgpt.cli.report import TEMPLATES as REPORT_TEMPLATES
from fgpt.io.files import write

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Row:
    """A training row on the page."""

    number: int
    """Of the rows that are trained on, from 1."""
    effect: float
    text: str
    """With what is trained on between marks."""


@dataclass(frozen=True)
class Page:
    """What the page shows."""

    title: str
    summary: str
    prompt: str
    answer: str
    unit: str
    """Of the effects."""
    supporting: list[Row]
    """The rows of largest effect first."""
    opposing: list[Row]
    """Those of most negative effect first."""

    @property
    def largest(self) -> float:
        """The largest effect by size, which bars are drawn in proportion to."""
        return max((abs(row.effect) for row in (*self.supporting, *self.opposing)), default=1.0)


def write_page(path: Path, page: Page) -> Path:
    """Write the page, and return its path."""
    css = (REPORT_TEMPLATES / "report.css").read_text(encoding="utf-8")
    write(path, render("attribution.html", TEMPLATES, title=page.title, page=page, report_css=css))
    return path
