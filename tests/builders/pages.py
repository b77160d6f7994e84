"""Pages in a browser, and the colors of their style."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fgpt.cli.pages import TEMPLATES

QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


def chromium(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page without a screen; stderr has what it logs."""
    if (program := shutil.which("chromium")) is None:
        pytest.skip("no chromium is on the PATH")
    alone = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / '.browser'}")
    logged = ("--enable-logging=stderr", f"--log-net-log={page.parent / 'net.json'}")
    command = [program, *alone, *QUIET, *logged, *options, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


def ask_browser(pages: list[str], folder: Path, script: str, width: int = 360) -> list[str]:
    """What a script says of each page, which it knows as `page`, a document in a frame of this width."""
    frames = "".join(f'<iframe width="{width}" height="800" srcdoc="{html.escape(text)}"></iframe>' for text in pages)
    answer = f"[...document.querySelectorAll('iframe')].map(f => (page => {script})(f.contentDocument)).join('|')"
    outer = folder / "frames.html"
    outer.write_text(f"<title></title>{frames}<script>onload = () => {{ document.title = {answer} }}</script>")
    dom = chromium(outer, "--dump-dom").stdout
    return html.unescape(dom.partition("<title>")[2].partition("</title>")[0]).split("|")


def style_colors() -> tuple[dict[str, str], dict[str, str]]:
    """The color variables of the style by name, in the light and in the dark scheme."""
    css = (TEMPLATES / "page.css").read_text()
    light, dark = css.split("@media (prefers-color-scheme: dark)")[:2]
    dark = dark[: dark.index("/*")]
    schemes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", text)) for text in (light, dark)]
    return schemes[0], schemes[1]
