"""`fgpt eval run`, `text` and `tasks`: each has options of its own; a call without one is told what to type."""

import shlex
from pathlib import Path

import pytest

from fgpt.cli.eval_command import COMMANDS, command_meant
from fgpt.cli.main import main
from fgpt.cli.options import option_names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lora-nano", "fgpt eval run lora-nano"),
        ("lora-nano --limit 7 --num-generations 4", "fgpt eval run lora-nano --limit 7 --num-generations 4"),
        ("'runs/a b'", "fgpt eval run 'runs/a b'"),
        ("--base nano --text 'a b.txt' --window 64", "fgpt eval text 'a b.txt' --base nano --window 64"),
        ("lora-nano --text a.txt", "fgpt eval text a.txt --run lora-nano"),
        ("--base nano --tasks hellaswag,arc_easy --chat", "fgpt eval tasks hellaswag,arc_easy --base nano --chat"),
        ("lora-nano --tasks hellaswag", "fgpt eval tasks hellaswag --run lora-nano"),
        ("--base nano --text", "fgpt eval run RUN, or fgpt eval text FILE --base MODEL, or fgpt eval tasks NAMES"),
        ("", "fgpt eval run RUN, or fgpt eval text FILE --base MODEL, or fgpt eval tasks NAMES"),
    ],
)
def test_a_call_without_a_subcommand_is_told_what_to_type(typed: str, meant: str, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", *shlex.split(typed)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: expected run, text or tasks after fgpt eval; type: {meant}")
    assert line.count("\n") == 1


def test_what_to_type_is_a_call_that_is_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Up to the run, the file or the task that does not exist."""
    missing = str(tmp_path / "missing")
    for typed, message in (
        ([missing, "--limit", "7"], "no trained run"),
        (["--base", "nano", "--text", missing, "--window", "64"], "No such file"),
        ([missing, "--text", missing], "no trained run"),
        (["--base", "nano", "--tasks", "x", "--include-path", missing], "no such folder"),
    ):
        program, *words = shlex.split(command_meant(typed))
        assert program == "fgpt"
        assert main(words) == 2
        assert message in capsys.readouterr().err


OPTIONS = {kind: set(option_names(command)) for kind, command in COMMANDS.items()}


def test_help_has_the_options_of_the_subcommand_alone(capsys: pytest.CaptureFixture[str]):
    assert {"--window", "--stride"} <= OPTIONS["text"]
    assert {"--num-fewshot", "--chat", "--include-path"} <= OPTIONS["tasks"]
    assert {"--num-generations", "--test", "--labels"} <= OPTIONS["run"]
    for kind, command in COMMANDS.items():
        assert main(["eval", kind, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"usage: fgpt eval {kind}" in text
        assert (command.__doc__ or "").split(":")[0] in text
        assert all(option in text for option in OPTIONS[kind])
        others = set[str]().union(*(OPTIONS[other] for other in COMMANDS if other != kind))
        assert [option for option in others - OPTIONS[kind] if option in text] == []


def test_help_lists_the_subcommands(capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    for kind, command in COMMANDS.items():
        assert f"fgpt eval {kind} " in text
        assert (command.__doc__ or "").splitlines()[0] in text


@pytest.mark.parametrize("kind", ["text", "tasks"])
def test_a_model_is_a_base_or_a_run(kind: str, capsys: pytest.CaptureFixture[str]):
    for model in ([], ["--base", "nano", "--run", "lora-nano"]):
        assert main(["eval", kind, "x", *model]) == 2
        assert "expected one of --base MODEL and --run RUN" in capsys.readouterr().err
