"""What adapters begin as: by --adapter.init the model begins as itself, and what is saved lies over the plain base."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders.command_line import training_options
from builders.runs import one_line

import fgpt
from fgpt.cli import run_dir, tasks
from fgpt.cli.main import main
from fgpt.cli.paths import shareable_fields
from fgpt.cli.train_command import recipe_with_options
from fgpt.cli.training.build import load_base
from fgpt.recipes import FineTuningRecipe
from fgpt.tree import leaves

TOKENS = torch.arange(12)[None]
QUICK = ["--compare-prompts", "0", "--quiet", "--adapter.rank", "4", "--steps", "2"]


def recipe_of(at: Path, *options: str) -> FineTuningRecipe:
    recipe = recipe_with_options("lora-nano", [*training_options(at)[1:], *options], "fgpt train lora-nano")
    assert isinstance(recipe, FineTuningRecipe)
    return recipe


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga", "eva"])
def test_the_model_begins_as_itself_and_is_saved_over_its_base(init: str, project: Path, tmp_path: Path):
    recipe = recipe_of(project, "--adapter.init", init, "--adapter.rank", "4")
    base, job = load_base(recipe), tasks.build_job(recipe)
    state = job.initial_state.take()
    begun = fgpt.adapt(job.frozen, state.trainable)
    torch.testing.assert_close(fgpt.apply(begun, TOKENS), fgpt.apply(base, TOKENS), atol=1e-4, rtol=1e-4)
    changed = any(not torch.equal(x, leaves(base)[path]) for path, x in leaves(job.frozen).items())
    assert changed == (init != "eva")
    for micro_batches, _ in zip(job.batches(0), range(2), strict=False):
        state, _ = job.train_step(state, micro_batches)
    trained = fgpt.apply(fgpt.adapt(job.frozen, state.trainable), TOKENS)
    assert (trained - fgpt.apply(base, TOKENS)).abs().max() > 1e-3
    run_dir.save_tuned(tmp_path, base, job.saved(state.trainable), "base")
    loaded = run_dir.load_tuned(tmp_path, base)
    torch.testing.assert_close(fgpt.apply(loaded, TOKENS), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_training_goes_on_from_an_adapter(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = [*training_options(project), *QUICK, "--out", str(tmp_path)]
    assert main(["train", *common, "--name", "first"]) == 0
    first = fgpt.load_peft(tmp_path / "first" / "adapter", load_base(recipe_of(project)))
    for source in (tmp_path / "first", tmp_path / "first" / "adapter"):
        job = tasks.build_job(recipe_of(project, "--adapter.rank", "4", "--adapter.init", str(source)))
        begun = job.initial_state.peek().trainable
        assert begun.keys() == first.keys()
        for path, x in leaves(first).items():
            assert torch.equal(leaves(begun)[path], x)
    capsys.readouterr()
    assert main(["train", *common, "--adapter.init", str(tmp_path / "first"), "--adapter.rank", "8"]) == 2
    assert "make them equal" in one_line(capsys)
    assert main(["train", *common, "--adapter.init", str(tmp_path / "first"), "--adapter.target", ".*q"]) == 2
    assert "give its --adapter.target" in one_line(capsys)
    assert main(["train", *common, "--adapter.init", str(tmp_path / "none")]) == 2
    assert "no trained run" in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter.init", "pissa", "--adapter.kind", "dora"], "is of --adapter.kind lora, not of dora"),
        (["--adapter.init", "eva", "--adapter.rank-pattern", ".*q=2"], "gives all layers one rank"),
        (["--adapter.init", "olora", "--quantize", "int8"], "take eva or default, or leave out --quantize"),
    ],
)
def test_what_does_not_go_together(
    options: list[str], message: str, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", *training_options(project), *options, "--out", str(tmp_path), "--quiet"]) == 2
    assert message in one_line(capsys)


def test_a_path_is_shared_by_its_last_part(project: Path, tmp_path: Path):
    recipe = recipe_of(project)
    recipe = replace(recipe, adapter=replace(recipe.adapter, init="/home/me/adapters/mine"))
    assert shareable_fields(recipe.to_json())["adapter"]["init"] == ".../mine"
    run_dir.write_run(tmp_path, recipe)
    assert "/home/me" not in (tmp_path / "run.json").read_text()
    assert replace(run_dir.read_run(tmp_path), out=recipe.out) == recipe


def test_a_run_is_no_base(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = project / "runs" / "it[b]"
    options = training_options(project)
    options[options.index("--base") + 1] = str(run)
    assert main(["train", *options, "--out", str(tmp_path), "--quiet"]) == 2
    message = one_line(capsys)
    assert "is a run, and no model" in message
    assert "--adapter.init" in message
    assert json.loads((run / "run.json").read_text())["adapter"]["init"] == "default"
