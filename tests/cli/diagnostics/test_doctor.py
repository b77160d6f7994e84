"""`fgpt doctor` of recipes of every kind."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import same
from builders.checks import CHECKS, Patch

import fgpt
from fgpt.cli import tasks
from fgpt.cli.diagnostics import doctor
from fgpt.errors import InputError
from fgpt.recipes import ClassificationRecipe, PretrainingRecipe, find
from fgpt.tree import leaves

NANO = replace(find("lora-nano"), max_seq_len=160, micro_batch_size=2, overlong="drop")  # pyright: ignore[reportCallIssue]


@pytest.mark.slow
def test_doctor_of_a_run(capsys: pytest.CaptureFixture[str]):
    found = doctor.run(NANO)
    assert {x.check for x in found if not x.holds} <= {"packing"}  # which short rows give nothing to be asked of
    printed = capsys.readouterr().err
    assert all(check in printed for check in CHECKS)
    assert f"torch {torch.__version__} on cpu" in printed
    assert "FAIL" not in printed


@pytest.mark.slow
def test_doctor_of_a_broken_run_says_which_laws(patch: Patch, capsys: pytest.CaptureFixture[str]):
    patch("fgpt.checks.persistence", "load_peft", lambda load: lambda *_: {})
    with pytest.raises(InputError, match="lora-nano: save and load: broken on this machine"):
        doctor.run(NANO)
    assert "FAIL" in capsys.readouterr().err


@pytest.mark.slow
def test_doctor_of_full_tuning_asks_of_the_base_itself():
    run = find("full-nano")
    base, adapters, first = doctor.first_step_inputs(tasks.build_job(run))
    assert adapters.keys() == leaves(base).keys()
    assert same(base, fgpt.load("nano"))
    assert len(first.tokens) >= doctor.NUM_ROWS


@pytest.mark.slow
def test_doctor_of_pretraining_and_of_a_classifier(tmp_path: Path):
    stories, rows = tmp_path / "stories.txt", tmp_path / "rows.txt"
    stories.write_text("<|endoftext|>".join(f"Once there was a fox who had {i} hats." for i in range(40)))
    small = PretrainingRecipe(
        name="p",
        data=(stories,),
        n_layer=1,
        n_head=2,
        d_model=32,
        max_seq_len=24,
        micro_batch_size=3,
        steps=2,
        device="cpu",
        compile=False,
    )
    assert all(x.holds is not False for x in doctor.run(small))
    rows.write_text("".join(f"I feel {word} and {i};{word}\n" for i in range(12) for word in ("sad", "glad")))
    recipe = ClassificationRecipe(
        name="c",
        base="nano",
        train=str(rows),
        num_heldout=4,
        max_seq_len=48,
        micro_batch_size=3,
        head="classifier",
        device="cpu",
    )
    assert all(x.holds is not False for x in doctor.run(recipe))
