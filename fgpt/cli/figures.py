"""Plots as files."""

import io
from pathlib import Path
from typing import Any

from fgpt.io.files import to_utf8, write


def escape_mathtext(text: str) -> str:
    """A text that matplotlib draws as it is: no dollar starts a formula, lone surrogates are escaped."""
    return to_utf8(text).decode("utf-8").replace("$", r"\$")


def save_png(figure: Any, picture: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, atomically, and close it."""
    import matplotlib.pyplot as plt

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, bbox_inches="tight")  # long labels are not cut
    plt.close(figure)
    write(picture, drawn.getvalue())
