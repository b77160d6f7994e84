"""The decay of the learning rate, and rows of one example each."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from fgpt.cli.main import main
from fgpt.cli.training.build import row_width
from fgpt.cli.training.optimizers import make_schedule
from fgpt.cli.training.row_order import RowOrder
from fgpt.data.examples import Example
from fgpt.recipes import InstructionRecipe, find

REFERENCES = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}


def nano(**options: object) -> InstructionRecipe:
    recipe = replace(find("lora-nano"), **options)
    assert isinstance(recipe, InstructionRecipe)
    return recipe


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@given(warmup=st.integers(0, 12), rest=st.integers(1, 12))
def test_the_decay_is_transformers(decay: str, warmup: int, rest: int):
    """Its warmup begins at 0, in which no step would learn; ours is one step further."""
    recipe = nano(lr=0.5, lr_scheduler_type=decay, warmup_steps=warmup)
    schedule, steps = make_schedule(recipe, warmup + rest), range(warmup + rest)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    reference = REFERENCES[decay](optimizer, warmup, warmup + rest).lr_lambdas[0]
    expected = [0.5 * reference(step + 1 if step < warmup else step) for step in steps]
    assert [float(schedule(torch.tensor(step))) for step in steps] == pytest.approx(expected)


def test_an_optimizer_without_decay_has_no_form_of_it(capsys: pytest.CaptureFixture[str]):
    options = ["--optimizer", "schedule_free_adamw", "--lr-scheduler-type", "linear"]
    assert main(["train", "lora-nano", *options]) == 2
    expected = "--lr-scheduler-type linear is a decay: schedule_free_adamw has none, leave it out"
    assert expected in " ".join(capsys.readouterr().err.split())


def test_without_packing_each_row_is_an_example(tmp_path: Path):
    examples = [Example.completion(tuple(range(1, 4 + i % 5)), 1) for i in range(21)]
    plain = RowOrder(examples, nano(packing=False, micro_batch_size=4, grad_accumulation_steps=2), 512)
    updates = plain.first_epoch
    assert sorted(len(update) for update in updates) == [5, 8, 8]
    assert sorted(i for update in updates for row in update for i in row) == list(range(21))
    assert all(len(row) == 1 for update in updates for row in update)
    packed = RowOrder(examples, nano(micro_batch_size=8), 512).first_epoch
    assert [len(update) for update in packed] == [1]  # one row has all of them


def test_rows_of_one_example_are_padded_to_no_full_length_on_a_gpu():
    cuda = torch.device("cuda")
    assert row_width(nano(), cuda, 512) == 512
    assert row_width(nano(packing=False), cuda, 512) is None
    assert row_width(nano(packing=False, compile=True), torch.device("cpu"), 512) == 512


@pytest.mark.parametrize("recipe", ["dpo-nano", "grpo-nano"])
def test_recipes_that_pack_nothing_have_no_packing(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--no-packing", "--base", "nano", "--out", str(tmp_path)]
    assert main(["train", recipe, *options]) == 2
    assert "--packing is of instruction tuning: leave it out" in capsys.readouterr().err
