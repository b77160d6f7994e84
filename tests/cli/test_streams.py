"""Closed pipes, full disks, old locales, paths that are no text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT
from builders.command_line import CommandProcess, training_options

import fgpt
import fgpt.cli.tasks.instruction_tuning
import fgpt.cli.training.build
import fgpt.cli.training.step_log
from fgpt.cli.main import main
from fgpt.io import models


def closed_pipe() -> int:
    """The end to write into of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.slow
def test_a_reader_that_goes_ends_a_command_quietly(project: Path):
    command = [sys.executable, "-m", "fgpt", "runs"]
    done = subprocess.run(command, cwd=ROOT, stdout=closed_pipe(), stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
    run, classifier_run = str(project / "runs" / "it[b]"), str(project / "runs" / "told[b]")
    for args in (
        ["generate", run, "Hi.", "--max-new-tokens", "20"],
        ["classify", classifier_run, "hi"],
        ["generate", "--help"],
    ):
        assert CommandProcess(args, stdout=closed_pipe()).end() == (141, "", ""), args


def test_a_training_nobody_listens_to_goes_on(project: Path, tmp_path: Path):
    """Both streams are closed from the first line on."""
    args = [
        "train",
        *training_options(project),
        "--compare-prompts",
        "2",
        "--max-new-tokens",
        "3",
        "--eval-every",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert CommandProcess(args, stdout=closed_pipe(), stderr=closed_pipe()).end()[0] == 0
    run = tmp_path / "lora-nano"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert (run / "compare.html").is_file()


def test_a_full_disk_behind_stdout_is_said(project: Path):
    args = ["generate", str(project / "runs" / "it[b]"), "Hi.", "--max-new-tokens", "3"]
    status, _, output = CommandProcess(args, stdout=os.open("/dev/full", os.O_WRONLY)).end()
    assert (status, output) == (2, "error: writing: No space left on device; free space or choose another folder\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_replaced(encoding: str, project: Path):
    for text in ("漢字 it is 1", os.fsdecode(b"\xe9\xe9 it is 1")):
        status, out, err = CommandProcess(
            ["classify", str(project / "runs" / "told[b]"), text], encoding=encoding
        ).end()
        assert status == 0, err
        assert "?? it is 1" in out
    status, _, err = CommandProcess(["train", "漢字"], encoding=encoding).end()
    assert (status, err.count("\n")) == (2, 1)
    assert "no recipe named '??'" in err


@pytest.mark.slow
def test_the_oldest_locale_is_enough(project: Path):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    args = ["classify", str(project / "runs" / "told[b]"), "--file", "-"]
    command = [sys.executable, "-m", "fgpt", *args]
    text = "漢字 it is 1".encode()
    done = subprocess.run(command, cwd=ROOT, env=environment, input=text, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"?? it is 1" in done.stdout
    assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_paths_that_are_no_text(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    base, data = Path(odd) / "base", Path(odd) / "rows.json"
    models.save(fgpt.load(str(project / "base")), base, like=str(project / "base"))
    data.write_bytes((project / "rows.json").read_bytes())
    options = [
        "--base",
        str(base),
        "--data",
        str(data),
        "--out",
        odd,
        "--compare-prompts",
        "2",
        "--max-new-tokens",
        "2",
    ]
    assert main(["train", *training_options(project), *options]) == 0
    run = str(Path(odd) / "lora-nano")
    assert main(["generate", run, "Hi.", "--max-new-tokens", "2"]) == 0
    assert main(["compare", run, "--num-prompts", "1", "--max-new-tokens", "2"]) == 0
    assert main(["eval", "run", run]) == 0
    assert main(["report", run]) == 0
    capsys.readouterr()
    assert main(["generate", os.fsdecode(b"caf\xe9"), "Hi."]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(
        ["generate", run, os.fsdecode(b"caf\xe9"), "--stop", os.fsdecode(b"caf\xe9"), "--max-new-tokens", "2"]
    ) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
