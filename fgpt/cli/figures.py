"""Pictures as files."""

import io
from pathlib import Path
from typing import Any

from fgpt.io.files import encoded, write


def escape_mathtext(text: str) -> str:
    """A user's text as matplotlib can draw it: no dollar in it begins a formula, and half of a surrogate pair is its
    escape, as in a file.
    """
    return encoded(text).decode("utf-8").replace("$", r"\$")


def save_png(figure: Any, picture: Path, dpi: int) -> None:
    """Write a figure of matplotlib's as PNG, whole or not at all, and let go of it."""
    import matplotlib.pyplot as plt

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    plt.close(figure)
    write(picture, drawn.getvalue())
