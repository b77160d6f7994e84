"""Help at every level, options in groups, flags, paths of the caller."""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from builders import ROOT

from fgpt.cli.commands import COMMANDS
from fgpt.cli.main import main
from fgpt.cli.options import GROUPS, option_names
from fgpt.recipes import KINDS, RECIPES


def test_help_at_every_level(capsys: pytest.CaptureFixture[str]):
    for args in ([], ["--help"], ["-h"]):
        assert main(args) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in COMMANDS)
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        output = capsys.readouterr()
        assert "usage: fgpt" in output.out
        assert output.err == ""
    for name in ("lora-nano", "emotion-small", "pretrain-nano"):
        for verb in ("train", "doctor"):
            assert main([verb, name, "--help"]) == 0
            assert f"usage: fgpt {verb} {name}" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("just") is None, reason="just is not installed")
def test_just_takes_the_paths_of_the_folder_it_is_called_in(tmp_path: Path):
    (tmp_path / "justfile").write_text((ROOT / "justfile").read_text())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    python, folder = tmp_path / ".venv" / "bin" / "python", tmp_path / "sub folder"
    python.parent.mkdir(parents=True)
    folder.mkdir()
    python.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    os.utime(tmp_path / "pyproject.toml", (0, 0))
    os.utime(tmp_path / "constraints.txt", (0, 0))
    (tmp_path / ".venv" / "ready").touch()
    for name in COMMANDS:
        done = subprocess.run(["just", name, "./a b", "--x"], cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [str(folder), "-m", "fgpt", name, "./a b", "--x"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_a_recipe_is_in_one_group_with_its_help(kind: str, capsys: pytest.CaptureFixture[str]):
    grouped = " ".join(GROUPS.values()).split()
    fields = [field.name for field in dataclasses.fields(KINDS[kind])]
    assert len(grouped) == len(set(grouped))
    assert set(fields) <= set(grouped)
    name = next(name for name, make in RECIPES.items() if make().kind == kind)
    assert main(["train", name, "--help"]) == 0
    text = capsys.readouterr().out
    assert (
        text.index("--base" if kind != "pretraining" else "--data")
        < text.index("--lr ")
        < text.index("--seed")
        < text.index("--eval-every")
    )
    assert all(option in text for option in option_names(KINDS[kind]))
    assert "--remat, --no-remat" in text or kind == "pretraining"


def test_booleans_are_flags(project: Path, capsys: pytest.CaptureFixture[str]):
    for kind, flags in (("lora-nano", ["--remat", "--no-keep-best"]), ("pretrain-nano", ["--no-compile"])):
        assert main(["train", kind, *flags, "--help"]) == 0
        assert main(["train", kind, flags[0], "True"]) == 2
        assert "True" in capsys.readouterr().err
