"""An attribution on one page: the answer, the rows that speak for it, and those that speak against it."""

from dataclasses import dataclass
from pathlib import Path

from fgpt.cli.pages import render
from fgpt.cli.pages.tables import Cell, Column, Table, text_column
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
    sides = [
        ("for", "Rows for the answer", _table(page, page.supporting, "c1")),
        ("against", "Rows against it", _table(page, page.opposing, "c2")),
    ]
    html = render("attribution.html", [TEMPLATES], title=page.title, summary=page.summary, page=page, sides=sides)
    write(path, html)
    return path


def _table(page: Page, rows: list[Row], color: str) -> Table:
    """Rows with their effects as numbers and bars."""
    cells = []
    for row in rows:
        effect = Cell(f"{row.effect:+.2g}", row.effect, color=color, bar=abs(row.effect) / page.largest)
        cells.append([Cell(str(row.number)), effect, Cell(row.text)])
    heads = [Column("row"), Column(page.unit), text_column("text, with what is trained on between « and »")]
    return Table("training rows and their effects", heads, cells)
