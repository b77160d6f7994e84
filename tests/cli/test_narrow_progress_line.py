"""The progress line of a training in a narrow terminal: the step and the ETA stay, the metrics are cut."""

import re

import pytest

from fgpt.cli import console
from fgpt.cli.training import step_log


@pytest.mark.parametrize("width", [60, 72])
def test_step_and_eta_fit(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    terminal = console.Console(stderr=True, markup=False, highlight=False, force_terminal=True, width=width)
    monkeypatch.setattr(step_log, "console", terminal)
    with step_log.progress_line(99_990, 100_000) as show:
        for step in range(99_991, 99_999):
            show({"step": step, "loss": 12.3456, "tokens": 10**9, "seconds": 100.0, "memory_gb": 78.25, "mfu": 0.5})
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    drawn = [line.strip() for line in re.split(r"[\r\n]", plain) if line.strip()]
    assert max(map(len, drawn)) <= width
    assert re.fullmatch(r"99998/100000 loss 12\..* \d+:\d\d:\d\d eta (\d|-):(\d\d|--):(\d\d|--)", drawn[-1])
