"""What a terminal shows: names in brackets, narrow columns, work without a terminal."""

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest
from builders.command_line import ODD_NAME, training_options
from rich.progress import Progress

import fgpt
import fgpt.cli.tasks.instruction_tuning
import fgpt.cli.training.build
import fgpt.cli.training.step_log
from fgpt.cli import console as shown
from fgpt.cli.main import main
from fgpt.cli.training.build import describe_sizes
from fgpt.layers import num_parameters

# ----------------------------------------------------------------------------------------------------------- the header


def test_a_header_counts_parameters_and_not_bytes():
    base = fgpt.load("nano")
    adapters = fgpt.lora(base, fgpt.key(0), rank=8, target=r"blocks\..*\.(q|v)")
    classifier_run = describe_sizes("nano", base, adapters)
    assert classifier_run == "nano (4,339,200 parameters), 32,768 trained (0.8 %)"
    for kind in ("nf4", "int8", "blockwise8"):
        assert describe_sizes("nano", fgpt.quantize(base, kind), adapters) == classifier_run
    whole = fgpt.trainable_leaves(base, ".*")
    assert describe_sizes("nano", base, whole).endswith("4,339,200 trained (100.0 %)")
    table = fgpt.lora(base, fgpt.key(0), rank=1, target=r"blocks\.0\.attn\.q")
    assert describe_sizes("nano", base, table).endswith("512 trained (0.01 %)")
    assert num_parameters(fgpt.adapt(base, adapters)) == 4_339_200 + 32_768


# ---------------------------------------------------------------------------------------------------- names in brackets


def every_command(at: Path) -> dict[str, list[str]]:
    run, classifier_run = str(at / "runs" / "it[b]"), str(at / "runs" / "told[b]")
    return {
        "generate": [run, ODD_NAME, "--max-new-tokens", "3"],
        "compare": [run, "--max-new-tokens", "3", "--num-prompts", "2"],
        "classify": [classifier_run, ODD_NAME, "it is [bold]"],
        "merge": [run],
        "eval": ["run", run],
        "report": [run],
        "replay": [run, "--step", "2"],
        "doctor": [*training_options(at), "--name", ODD_NAME.replace("/", "")],
    }


@pytest.mark.parametrize("name", ["generate", "compare", "classify", "merge", "eval", "report", "replay", "doctor"])
def test_names_in_brackets_are_printed_as_they_are(name: str, project: Path, capsys: pytest.CaptureFixture[str]):
    assert main([name, *every_command(project)[name]]) == 0
    output = capsys.readouterr()
    text = "".join((output.out + output.err).split())
    expected = {
        "generate": "",
        "compare": "it[b]:baseagainsttuned",
        "classify": "[/neg]",
        "replay": "[/red]x[b]:smile:",
        "doctor": "[red]x[b]:smile::checks",
    }
    assert expected.get(name, "it[b]") in text
    if name == "classify":
        assert ODD_NAME in output.out
        assert "[pos]" in output.out
        assert "it is [bold]" in output.out


def test_work_in_brackets_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "100")
    terminal = shown.Console(stderr=True, markup=False, emoji=False, highlight=False, force_terminal=True)
    monkeypatch.setattr(shown, "console", terminal)
    for total in (None, 3):
        with shown.show_progress(f"loading {ODD_NAME}", total) as advance:
            advance(1)
        assert f"loading {ODD_NAME}" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- how far the work is


def test_work_without_a_terminal_is_a_line_after_a_while(monkeypatch: Any, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(shown, "FIRST_LINE_AFTER", 0.05)
    assert list(shown.progress([1, 2], "reading")) == [1, 2]
    assert capsys.readouterr().err == ""  # it was quick
    for i, _ in enumerate(shown.progress(range(3), "reading")):
        time.sleep(0.3 if i == 1 else 0)
        assert list(shown.progress(range(2), "within")) == [0, 1]
    with shown.show_progress("loading"):
        time.sleep(0.3)
    output = capsys.readouterr().err.splitlines()
    assert output == ["reading: 1 of 3 in 0 s, eta 0 s", "loading: 0 s so far .."]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_shows_step_and_eta(width: int, capsys: pytest.CaptureFixture[str]):
    terminal = shown.Console(stderr=True, force_terminal=True, width=width)
    figures = "loss 2.041  14,000 tok/s  MFU 12.3 %  10.25 GB"
    clock = itertools.count(0.0, 10.0)
    bars = Progress(*shown.training_columns(width), console=terminal, expand=True, get_time=lambda: next(clock))
    task = bars.add_task("training", total=10_000, completed=0, figures="")
    for _ in range(8):
        bars.update(task, advance=1, figures=figures)
    terminal.print(bars.get_renderable())
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) > 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", line)
    assert len(plain) <= width
    assert "8/10000 " in plain
    assert "loss 2.041" in plain
    assert re.search(r"eta \d+:\d\d:\d\d", plain)
    assert "10.25 GB" in plain or width < 120
