"""The style: every color of a text can be read, on every background, light and dark."""

import re
from collections.abc import Sequence

import pytest
from builders.pages import style_colors

from fgpt.cli.pages import TEMPLATES

BACKGROUNDS = ("paper", "card", "good")
TEXTS = ("ink", "soft", "warn", "c0", "c1", "c2", "c3", "c4", "c5")
LIGHT, DARK = style_colors()


def luminance(color: str) -> float:
    """Source: WCAG 2.2, relative luminance."""
    channels: Sequence[float] = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Source: WCAG 2.2, contrast ratio."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the known case just below 4.5


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_can_be_read(scheme: dict[str, str], text: str):
    for background in BACKGROUNDS:
        assert contrast(scheme[text], scheme[background]) >= 4.5, background


def test_both_schemes_have_all_colors():
    assert set(LIGHT) == set(DARK) == {*BACKGROUNDS, *TEXTS, "line"}


def test_nothing_else_colors_a_text():
    """So that the test above is of every text, and of every background."""
    css = (TEMPLATES / "page.css").read_text()
    rules = css[css.index("/* The page */") :]
    colors = re.findall(r"(?<![\w-])(?:color|fill): ([^;}]+)", rules)
    backgrounds = re.findall(r"(?<![\w-])background(?:-color)?: ([^;}]+)", rules)
    of_texts = {f"var(--{x})" for x in (*TEXTS, "c", "card")}  # --c is one of c0 to c5
    assert {x.strip() for x in colors} <= of_texts | {"inherit", "none", "transparent"}
    assert {x.strip() for x in backgrounds} <= {f"var(--{x})" for x in (*BACKGROUNDS, "c")} | {"none", "#ffffff"}
