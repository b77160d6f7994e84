"""The environment of a report names no one."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fgpt.cli import environment


def test_the_environment_names_no_one():
    facts = environment.environment()
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["cores"] >= 1
    assert facts["threads"] >= 1
    text = json.dumps(facts)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text.replace("//", "/") or str(Path.home()) == "/"
    assert str(Path(environment.__file__).parent) not in text


def test_a_commit_is_that_of_the_clone_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = environment._commit
    if shutil.which("git"):
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q"], check=True)
        (tmp_path / "fgpt").mkdir()
        (tmp_path / "fgpt" / "a.py").touch()
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "a"], check=True)
        clean = commit(tmp_path)
        assert len(clean["commit"]) == 40
        assert clean["clean"]
        (tmp_path / "notes.txt").touch()
        assert commit(tmp_path) == clean
        (tmp_path / "fgpt" / "a.py").write_text("changed")
        assert commit(tmp_path) == clean | {"clean": False}
    below = tmp_path / "site-packages"
    below.mkdir()
    assert commit(below) == {"commit": None, "clean": None}  # it lies in somebody's repository
    monkeypatch.setenv("PATH", str(below))
    assert commit(tmp_path) == {"commit": None, "clean": None}  # no git
