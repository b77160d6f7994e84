"""The site is built without a warning, and its pages request nothing from another host."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from builders import ROOT

pytest.importorskip("mkdocs", reason="mkdocs is not installed: the group docs of pyproject.toml has it")
pytest.importorskip("material", reason="mkdocs-material is not installed")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
pytest.importorskip("jupytext", reason="jupytext is not installed")

REQUESTED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
"""The attributes that a browser loads by itself. A canonical link is a name, and no site here has one."""


class Requests(HTMLParser):
    """The addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collects the address of a tag."""
        address = dict(attrs).get(REQUESTED.get(tag, ""))
        if address is not None:
            self.addresses.append(address)


def requests(html: str) -> list[str]:
    parser = Requests()
    parser.feed(html)
    return parser.addresses


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.slow
def test_the_pages_are_there(site: Path):
    for page in ("index", "start/tour", "api/transforms", "project/results", "notebooks/hessian_spectrum"):
        assert (site / f"{page}.html").exists()
    assert (site / "source" / "fgpt" / "weights.py.html").exists()


@pytest.mark.slow
def test_no_page_requests_another_host(site: Path):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        addresses = requests(page.read_text(encoding="utf-8"))
        assert addresses
        assert [x for x in addresses if "://" in x or x.startswith("//")] == [], page
    for sheet in sorted(site.rglob("*.css")):
        assert "url(http" not in sheet.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_public_name_can_be_linked_to(site: Path):
    assert 'id="fgpt.lora"' in (site / "api" / "adapters.html").read_text(encoding="utf-8")


def test_requests_are_recognized():
    html = '<a href="https://a.b"></a><script src="https://c.d/x.js"></script><img src="x.svg">'
    assert requests(html) == ["https://c.d/x.js", "x.svg"]
