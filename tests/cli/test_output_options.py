"""--json, --quiet and --verbose: what is on stdout, and what is on stderr."""

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.command_line import training_options
from builders.runs import one_line

from fgpt.cli import console as shown
from fgpt.cli.main import main
from fgpt.cli.output_options import JSON_COMMANDS, print_json, split_output_options
from fgpt.errors import InputError

RUN, CLASSIFIER = "it[b]", "told[b]"


def arguments(name: str, at: Path) -> list[str]:
    runs = at / "runs"
    return {
        "runs": ["runs", "--out", str(runs)],
        "generate": ["generate", str(runs / RUN), "Say 3.", "--max-new-tokens", "3"],
        "classify": ["classify", str(runs / CLASSIFIER), "it is 3", "it is 4"],
        "compare": ["compare", str(runs / RUN), "--num-prompts", "2", "--max-new-tokens", "2"],
        "eval": ["eval", "run", str(runs / RUN), "--limit", "3"],
        "doctor": ["doctor", *training_options(at)],
    }[name]


FIELDS = {
    "runs": {"runs", "sweeps"},
    "generate": {"run", "base", "template", "prompt", "input", "responses", "sources"},
    "classify": {"run", "labels", "predictions"},
    "compare": {"settings", "steps", "scores", "intervals", "best", "answers", "file"},
    "eval": {"evaluated", "base", "settings", "held out"},
    "doctor": {"recipe", "machine", "checks"},
}


@pytest.mark.parametrize("name", JSON_COMMANDS)
def test_json_is_one_document_and_all_of_stdout(name: str, project: Path, capsys: pytest.CaptureFixture[str]):
    args = arguments(name, project)
    assert main([*args, "--json", "--quiet"]) == 0
    output = capsys.readouterr()
    document = json.loads(output.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert document.keys() == FIELDS[name]
    assert output.err == ""  # no table besides


def test_json_says_what_the_command_prints(project: Path, capsys: pytest.CaptureFixture[str]):
    args = arguments("generate", project)
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["responses"] == [printed.strip()]
    assert main([*arguments("classify", project), "--json"]) == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    assert [x["text"] for x in predictions] == ["it is 3", "it is 4"]
    for x in predictions:
        assert x["label"] == max(x["probabilities"], key=x["probabilities"].get)
        assert sum(x["probabilities"].values()) == pytest.approx(1)
    assert main([*arguments("runs", project), "--json"]) == 0
    by_name = {run["name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert (by_name[RUN]["step"], by_name[RUN]["steps"], by_name[RUN]["state"]) == (3, 3, "finished")


def test_quiet_leaves_results_and_errors(project: Path, capsys: pytest.CaptureFixture[str]):
    args = arguments("eval", project)
    assert main(args) == 0
    loud = capsys.readouterr().err
    assert main(["--quiet", *args]) == 0
    quiet = capsys.readouterr().err
    assert "written: " in loud
    assert "written: " not in quiet
    assert "held-out rows" in quiet
    assert main(["generate", "no-such-run", "hi", "--quiet"]) == 2
    assert "no trained run 'no-such-run'" in one_line(capsys)
    assert not shown.console.quiet  # the next command of this process prints again


def test_verbose_tells_versions_files_and_times(project: Path, capsys: pytest.CaptureFixture[str]):
    args = arguments("generate", project)
    assert main([*args, "--verbose"]) == 0
    output = capsys.readouterr()
    for part in (
        "debug: fgpt ",
        "torch ",
        f"reading the model {project / 'base'}",
        "loading ",
        " GB of memory at most",
    ):
        assert part in output.err
    assert "debug" not in output.out
    assert main(args) == 0
    assert "debug" not in capsys.readouterr().err
    assert logging.getLogger("fgpt").handlers == []
    assert main(["generate", "no-such-run", "hi", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_prompt_from_standard_input(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    args = arguments("generate", project)
    assert main(args) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Say 3.\n")))
    assert main([*args[:2], "-", *args[3:]]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main([*args[:2], "-", *args[3:]]) == 2
    assert "standard input is empty: expected a text" in one_line(capsys)


def test_output_options_anywhere_but_after_two_dashes():
    output, args = split_output_options(["eval", "--json", "run", "x", "--quiet"])
    assert (output.json, output.quiet, output.verbose) == (True, True, False)
    assert args == ["eval", "run", "x"]
    assert split_output_options(["classify", "x", "--", "--json"])[1] == ["classify", "x", "--", "--json"]
    with pytest.raises(InputError, match="give one of them"):
        split_output_options(["runs", "--quiet", "--verbose"])
    with pytest.raises(InputError, match="fgpt train has no --json"):
        split_output_options(["train", "--json"])


def test_numbers_that_json_does_not_have_are_null(capsys: pytest.CaptureFixture[str]):
    print_json({"a": [float("nan"), 1.5], "b": (float("inf"),), "c": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None], "c": "x"}


@pytest.mark.parametrize("width", [40, 60])
def test_work_in_a_narrow_terminal_keeps_its_figures(width: int, monkeypatch: Any, capsys: pytest.CaptureFixture[str]):
    terminal = shown.Console(stderr=True, markup=False, emoji=False, force_terminal=True, width=width, no_color=True)
    monkeypatch.setattr(shown, "console", terminal)
    with shown.show_progress("reading a file whose name is longer than the terminal is wide, or nearly so", 1000) as n:
        n(8)
    drawn = capsys.readouterr().err
    assert "8/1000" in drawn
    assert "eta" in drawn


def test_a_narrow_terminal_lists_the_labels(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    args = arguments("classify", project)
    monkeypatch.setattr(shown.answers, "width", 40)
    assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == ["it is 3", "it is 4"]
    assert all(len(line) <= 40 and "…" not in line for line in lines)
    assert sum(line.endswith(("[pos]", "[/neg]")) for line in lines) == 4
