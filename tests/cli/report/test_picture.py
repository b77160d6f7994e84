"""Pictures of what users call things: every label can be drawn."""

from pathlib import Path

import pytest

from fgpt.cli.evaluation.metrics.classes import plot_confusion, scores


@pytest.mark.parametrize("name", ["half \ud83d", "$5", "$\\frac$", "a$b$c_{", "<b>joy", "\\"])
def test_any_label_can_be_drawn(name: str, tmp_path: Path):
    plot_confusion(scores([0, 1], [0, 1], 2), (name, "other"), tmp_path / "a.png", name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
