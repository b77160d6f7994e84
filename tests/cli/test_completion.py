"""The completion of a shell, asked as the shell asks it: in bash, of every command."""

import shutil
import subprocess

import pytest

from fgpt.cli.commands import COMMANDS, summaries
from fgpt.cli.completion import completion_script, option_classes, other_options
from fgpt.cli.main import main
from fgpt.cli.options import option_names
from fgpt.recipes import RECIPES

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
ASK = """
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
_shtab_fgpt fgpt "${{COMP_WORDS[$COMP_CWORD]}}" "${{COMP_WORDS[$((COMP_CWORD - 1))]}}"
echo "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script() -> str:
    return completion_script("bash", COMMANDS, summaries())


def ask(script: str, *lines: str, cwd: object = None) -> list[set[str]]:
    """What bash offers for the last word of each line."""
    program = script + "".join(ASK.format(words=line) for line in lines)
    done = subprocess.run(["bash", "-c", program], cwd=str(cwd or "."), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [set(answer.split()) for answer in done.stdout.splitlines()]


@needs_bash
def test_commands_recipes_and_words(script: str):
    commands, recipes, optimizers, kinds = ask(
        script, "fgpt ''", "fgpt train ''", "fgpt train lora-nano --optimizer ''", "fgpt eval ''"
    )
    assert commands == {*COMMANDS}
    assert recipes == {*RECIPES}
    assert optimizers == {"adamw", "adamw8bit", "muon", "schedule_free_adamw"}
    assert kinds == {"run", "text", "tasks"}


@needs_bash
def test_every_option_of_every_command(script: str):
    first = {"data": "preview lora-nano", "eval": "run"}
    lines = [f"fgpt {name} {first.get(name, 'lora-nano')} --" for name in COMMANDS]
    for (name, classes), offered in zip(option_classes(COMMANDS).items(), ask(script, *lines), strict=True):
        options = {option for cls in classes for option in option_names(cls)}
        assert offered - {"--help"} == options | {*other_options(name)}, name


@needs_bash
def test_runs_are_the_folders_of_runs(script: str, tmp_path):
    for name in ("lora-a", "lora-b", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").touch()
    (tmp_path / "runs" / "lora-sweep").mkdir()  # generates nothing
    assert ask(script, "fgpt generate lora", "fgpt eval run lora", cwd=tmp_path) == [{"lora-a", "lora-b"}] * 2


def test_the_command_prints_it(script: str, capsys: pytest.CaptureFixture[str]):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.strip() == script.strip()
    assert main(["completion", "fish"]) == 2
    assert "expected one of bash, zsh, tcsh" in capsys.readouterr().err
