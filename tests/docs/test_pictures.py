"""The pictures of the site are small, are shown with words that say what is on them, and can be drawn again."""

import importlib.util
import re

from builders import ROOT

DOCS = ROOT / "docs"
SHOWN = {
    name: words
    for pattern in ("*.md", "*.py")
    for page in sorted(DOCS.rglob(pattern))
    for words, name in re.findall(r"!\[([^\]]*)\]\((?:\.\./)*pictures/(\w+)\.svg\)", page.read_text(encoding="utf-8"))
}


def test_each_picture_is_shown_and_each_that_is_shown_exists():
    assert SHOWN.keys() == {path.stem for path in (DOCS / "pictures").iterdir()}
    assert all(len(words.split()) > 5 for words in SHOWN.values())


def test_each_is_small_and_can_be_drawn_again():
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    assert pictures.PICTURES.keys() == SHOWN.keys()
    assert all(path.stat().st_size < 60_000 for path in (DOCS / "pictures").iterdir())
