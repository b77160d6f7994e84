"""Pictures as files."""

import io
from pathlib import Path
from typing import Any

from fgpt.io.files import write


def save(figure: Any, picture: Path, dpi: int) -> None:
    """Write a figure of matplotlib's as PNG, whole or not at all, and let go of it."""
    import matplotlib.pyplot as plt

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    plt.close(figure)
    write(picture, drawn.getvalue())
