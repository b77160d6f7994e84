"""A browser: tables sort by pointer and keyboard, nothing else runs, and no page is wider than a phone."""

from pathlib import Path

import pytest
from builders.pages import ask_browser
from builders.reports import EVIL, comparison_with, write_run_dir
from builders.sweeps import sweep_members

from fgpt.cli import report
from fgpt.cli.attribution.page import Page, Row, write_page
from fgpt.cli.evaluation.compare.html import page as comparison_page
from fgpt.cli.pages import render, script_hash
from fgpt.cli.pages.tables import Cell, Column, Table, text_column
from fgpt.cli.report.run_data import read_comparison
from fgpt.cli.sweep import page as sweep_page
from fgpt.io.files import write_json

LONG = "a" * 300
"""A word that no line holds."""


def all_pages(folder: Path) -> dict[str, str]:
    """One page of each kind, with texts that are long, and texts that are not to be run."""
    (folder / "runs").mkdir()
    status = {"state": "failed", "steps": 90, "why": f"{LONG} {EVIL}", "parameters": {"trained": 5, "total": 100}}
    for name in ("lora-nano", "lora-nano-2", LONG[:100]):
        write_run_dir(folder / "runs" / name, status=status, compare=comparison_with(), environment={"machine": LONG})
    (folder / "runs" / "lora-nano-2" / "metrics.jsonl").write_text("damaged\n")
    index = report.run_all(folder / "runs")
    several = report.run_several([str(folder / "runs" / name) for name in ("lora-nano", LONG[:100])])
    write_json(folder / "compare.json", comparison_with())
    rows = [Row(i, (i - 2.5) / 7, f"{LONG} «{EVIL}»") for i in range(6)]
    attribution = Page("Why it answers", LONG, f"{EVIL} {LONG}", LONG, "nats", rows[3:], rows[:3])
    return {
        "report": (folder / "runs" / "lora-nano" / "report.html").read_text(),
        "index": index.read_text(),
        "several": several.read_text(),
        "comparison": comparison_page(read_comparison(folder / "compare.json")),
        "attribution": write_page(folder / "attribution.html", attribution).read_text(),
        "sweep": sweep_page.page("sweep", LONG, sweep_members(folder), f"fgpt sweep {LONG}"),
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return all_pages(tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("width", [360, 768])
def test_no_page_is_wider_than_the_screen(pages: dict[str, str], width: int, tmp_path: Path):
    wide = "<meta name=viewport content='width=device-width'><p style='width: 900px'>x</p>"
    script = "page.documentElement.scrollWidth - page.documentElement.clientWidth"
    *hidden, of_wide = map(int, ask_browser([*pages.values(), wide], tmp_path, script, width))
    assert of_wide > 100  # what is asked for is there where a page is too wide
    assert dict(zip(pages, hidden, strict=True)) == dict.fromkeys(pages, 0)


def test_every_page_can_be_read_by_all(pages: dict[str, str], tmp_path: Path):
    """Landmarks, a language, heads of tables with their scope, and charts with a label."""
    questions = [
        "page.documentElement.lang",
        "page.querySelectorAll('header > h1').length + ' ' + page.querySelectorAll('body > main').length",
        "page.querySelectorAll('th:not([scope])').length + page.querySelectorAll('img:not([alt])').length",
        "[...page.querySelectorAll('figure > svg, .scroll')].filter(x => !x.ariaLabel).length",
        "[...page.querySelectorAll('.scroll')].filter(x => x.tabIndex !== 0).length",
    ]
    script = f"[{', '.join(questions)}].join(', ')"
    for name, answer in zip(pages, ask_browser([*pages.values()], tmp_path, script), strict=True):
        assert answer == "en, 1 1, 0, 0, 0", name
    assert pages["index"].count("<svg role") == 2
    assert pages["sweep"].count("<svg role") == 2


TABLE = Table(
    "numbers",
    [text_column("name"), Column("size")],
    [
        [Cell("b"), Cell("1,000")],
        [Cell("c"), Cell("")],
        [Cell("a"), Cell("30")],
        [Cell("d"), Cell("x of y", 200)],
    ],
)


def test_tables_sort(tmp_path: Path):
    (tmp_path / "one.html").write_text('{% import "pieces.html" as pieces %}{{ pieces.table(table) }}')
    page = render("one.html", [tmp_path], title="x", table=TABLE)
    order = "[...page.querySelectorAll('tbody th')].map(x => x.textContent).join('')"
    state = "[...page.querySelectorAll('thead th')].map(x => x.ariaSort)"
    size, name = (f"page.querySelectorAll('thead button')[{i}].click()" for i in (1, 0))
    script = f"[{order}, {size}, {order}, {state}, {size}, {order}, {state}, {name}, {order}, {state}].join(';')"
    (answer,) = ask_browser([page], tmp_path, script)
    assert answer == "bcad;;adbc;,ascending;;bdac;,descending;;abcd;ascending,"


def test_the_policy_lets_one_script_run(pages: dict[str, str], tmp_path: Path):
    script = "page.querySelectorAll('thead button').length > 0"
    altered = pages["index"].replace("<script>", "<script> ")  # no longer what the hash is of
    assert ask_browser([pages["index"], altered], tmp_path, script) == ["true", "false"]
    for name, page in pages.items():
        assert page.count("<script") == (name != "comparison"), name
        assert EVIL not in page
    assert "script-src" not in pages["comparison"]
    body = pages["index"].partition("<script>")[2].partition("</script>")[0]
    assert f"script-src '{script_hash(body)}'" in pages["index"]
