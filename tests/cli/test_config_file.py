"""--config: options from a file, below those of the command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from builders.runs import one_line

from fgpt.cli import config_file, run_json
from fgpt.cli.main import main
from fgpt.cli.train_command import recipe_with_options
from fgpt.errors import InputError
from fgpt.recipes import InstructionRecipe

YAML = """\
recipe: lora-nano
lr: 1e-3
steps: 7
data: [a.jsonl, b.jsonl]
remat: true
adapter:
  rank: 4
  alpha: 8
columns.output: answer
warmup_steps: null
"""


def recipe_of(path: Path, *options: str) -> InstructionRecipe:
    recipe = recipe_with_options("lora-nano", ["--config", str(path), *options], "fgpt train lora-nano")
    assert isinstance(recipe, InstructionRecipe)
    return recipe


def test_a_file_is_what_the_command_line_would_say(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    words = "--lr 1e-3 --steps 7 --data a.jsonl b.jsonl --remat --adapter.rank 4 --adapter.alpha 8"
    words += " --columns.output answer"
    assert recipe_of(path) == recipe_with_options("lora-nano", words.split(), "fgpt train lora-nano")


def test_the_command_line_counts(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    recipe = recipe_of(path, "--lr", "2e-3", "--data", "c.jsonl", "--no-remat", "--adapter.rank=2")
    assert (recipe.lr, recipe.data, recipe.remat, recipe.adapter.rank) == (2e-3, ("c.jsonl",), False, 2)
    assert (recipe.steps, recipe.adapter.alpha) == (7, 8.0)


def test_a_run_is_read_back(project: Path):
    folder = project / "runs" / "it[b]"
    run = run_json.read_run(folder)
    assert recipe_of(folder / "run.json", "--out", "x") == replace(run, out=Path("x"))
    assert recipe_of(folder / "run.json").out == Path("runs")


def test_a_file_alone_names_its_recipe(project: Path, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: dora-nano\n")
    run = project / "runs" / "told[b]" / "run.json"
    from fgpt.cli.train_command import with_recipe

    assert with_recipe(["--config", str(path), "--lr", "1"]) == ["dora-nano", "--config", str(path), "--lr", "1"]
    assert with_recipe([f"--config={run}"]) == ["emotion-small", f"--config={run}"]
    assert with_recipe(["lora-nano", "--config", "x"]) == ["lora-nano", "--config", "x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: [", "not valid YAML"),
        ("- lr", "expected options by name"),
        ("learning_rate: 1e-3", "did you mean --lr?"),
        ("lr: fast", "--lr is 'fast'"),
        ("steps: 0", "--steps is 0"),
        ("adapter: {kind: lorax}", "did you mean lora?"),
        ("data: [[a]]", "expected a list of words or numbers"),
    ],
)
def test_bad_files_are_one_line(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert main(["train", "lora-nano", "--config", str(path)]) == 2
    assert message in one_line(capsys)


def test_arguments_of_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "lora-nano", "--config", "--lr", "1"]) == 2
    assert "--config needs a file" in one_line(capsys)
    with pytest.raises(InputError, match="2 times"):
        config_file.split_config(["--config=a", "--config", "b"])
    assert main(["train", "lora-nano", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in one_line(capsys)
    (tmp_path / "run.json").write_text(json.dumps({"lr": 1}))
    assert main(["train", "--config", str(tmp_path / "run.json")]) == 2
    one_line(capsys)
