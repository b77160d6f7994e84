"""Which template a recipe trains in, which answers, and what is said of prompts that hold a template already."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from builders.conversations import ASSISTANT, TALK, USER, write_json_rows

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.training.examples import load_instruction_data
from fgpt.cli.training.row_reports import resolve_template
from fgpt.data.prompt_templates import template
from fgpt.data.rows import InstructionRow
from fgpt.io import models
from fgpt.recipes import RECIPES, InstructionRecipe, find

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base as it is, and with a chat template."""
    at = tmp_path_factory.mktemp("bases")
    cfg = dataclasses.replace(fgpt.load("nano").cfg, n_layer=1, n_head=2, d_model=16, d_mlp=16, n_ctx=96)
    for name in ("plain", "chat"):
        models.save(fgpt.init(cfg, fgpt.key(0)), at / name, like="nano")
    config = json.loads((at / "chat" / "tokenizer_config.json").read_text())
    (at / "chat" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    return {name: at / name for name in ("plain", "chat")}


def recipe_of(name: str, **changes: Any) -> InstructionRecipe:
    return replace(cast(InstructionRecipe, find(name)), **changes)


def test_a_base_with_a_chat_template_gets_it_by_default(bases: dict[str, Path]):
    plain, chat = (fgpt.tokenizer(bases[name]) for name in ("plain", "chat"))
    assert resolve_template(recipe_of("lora-medium"), plain).template == "alpaca"
    assert resolve_template(recipe_of("lora-medium"), chat).template == "chat"
    named = recipe_of("lora-medium", template="tulu")
    assert resolve_template(named, chat) == named
    assert resolve_template(recipe_of("lora-nano"), chat).template == "plain"


def test_what_recipes_say_of_their_template():
    """A recipe that names one keeps it on any base; the others are of GPT-2 and GPT-J, which have none: alpaca."""
    named = {"plain": ("-nano",), "tulu": ("tinytiny-", "chat-medium"), "chat": ("smollm2",), "none": ("cpt-",)}
    named["data-to-text"] = ("e2e-",)
    for name, make in RECIPES.items():
        recipe = make()
        if isinstance(recipe, InstructionRecipe) and recipe.template == "auto":
            assert recipe.base in ("gpt2", "gpt2-medium", "gpt2-large", "EleutherAI/gpt-j-6b"), name
        elif isinstance(recipe, InstructionRecipe):
            assert any(part in name for part in named[recipe.template]), name


def test_a_run_records_the_template_it_took(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = write_json_rows(tmp_path / "a.jsonl", *[{"messages": TALK}] * 6)
    options = ["--base", str(bases["chat"]), "--data", str(rows), "--steps", "1", "--micro-batch-size", "1"]
    options += ["--max-seq-len", "64", "--compare-prompts", "1", "--max-new-tokens", "2", "--out", str(tmp_path)]
    assert main(["train", "lora-small", *options]) == 0
    assert cast(InstructionRecipe, run_dir.read_run(tmp_path / "lora-small")).template == "chat"
    shown = capsys.readouterr().err
    assert "first example, template chat" in shown
    end = "<|endoftext|>"
    text = f"<user>Hello.{end}<assistant>«Bonjour.{end}»<user>Good night.{end}<assistant>«Bonne nuit.{end}»\n"
    assert text in shown


def test_a_run_that_records_no_template_was_alpaca(tmp_path: Path):
    run_dir.write_run(tmp_path, find("lora-medium"))
    values = json.loads((tmp_path / "run.json").read_text())
    del values["template"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert cast(InstructionRecipe, run_dir.read_run(tmp_path)).template == "alpaca"


def test_no_template_puts_nothing_between():
    none = template("none")
    assert none.prompt(InstructionRow("### Question: {x}?\n### Answer: ")) == "### Question: {x}?\n### Answer: "
    assert none.prompt(InstructionRow("Add.", "1 2")) == "Add.\n\n1 2"


@pytest.mark.parametrize("marker", ["### Instruction:\n", "<|im_start|>user\n"])
def test_prompts_that_hold_a_template_are_noticed(marker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"instruction": f"{marker if i else ''}Say {i}.", "output": "Yes."} for i in range(9)]
    path = write_json_rows(tmp_path / "a.jsonl", *rows)
    recipe = recipe_of("lora-nano", data=(str(path),), num_heldout=2)
    load_instruction_data(recipe)
    said = " ".join(capsys.readouterr().err.split())
    assert f"8 of 9 prompts hold a template already ({marker.strip().removesuffix('user')!r})" in said.replace(
        "user\\n", ""
    )
    assert "--template plain is put around it: --template none leaves them as they are" in said
    load_instruction_data(replace(recipe, template="none"))
    assert "already" not in capsys.readouterr().err
    few = write_json_rows(tmp_path / "b.jsonl", *[{**row, "instruction": "Hi."} for row in rows[:5]], *rows[6:])
    load_instruction_data(replace(recipe, data=(str(few),)))
    assert "already" not in capsys.readouterr().err


def test_the_last_answer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_json_rows(tmp_path / "a.jsonl", *[{"messages": TALK}] * 9, {"messages": [USER, ASSISTANT]})
    recipe = recipe_of("lora-nano", data=(str(path),), num_heldout=4, assistant_turns="last")
    data = load_instruction_data(recipe)
    said = " ".join(capsys.readouterr().err.split())
    assert "9 answers before the last of their conversation are context only (--assistant-turns last)" in said
    assert [len(example.spans) for example in data.examples] == [1] * 6
    assert len(data.heldout) == 4  # one turn of each
    load_instruction_data(replace(recipe, assistant_turns="all"))
    assert "context only" not in capsys.readouterr().err
