"""The header says what the format of the base costs, measures it once, and never where it cannot."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fgpt
from fgpt.cli import tasks
from fgpt.cli.cache import cache_folder
from fgpt.cli.diagnostics import doctor
from fgpt.cli.training import format_cost
from fgpt.cli.training.build import load_base
from fgpt.data.examples import Example
from fgpt.recipes import InstructionRecipe, find

RECIPE: Any = replace(find("lora-nano"), max_seq_len=96, micro_batch_size=2, overlong="drop", quantize="int8")  # pyright: ignore[reportCallIssue]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FGPT_CACHE", str(tmp_path))


def header(recipe: InstructionRecipe, capsys: pytest.CaptureFixture[str]) -> str:
    tasks.build_job(recipe)
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_header_of_a_quantized_base_alone_has_its_cost(capsys: pytest.CaptureFixture[str]):
    pattern = r"{} changes the loss by [+-].* % \(.* to .* nats\) and a LoRA's first gradient by (.*) %, on 128 tokens"
    plain = re.search(pattern.format("int8"), header(RECIPE, capsys))
    rotated = re.search(pattern.format("rotated-int8"), header(replace(RECIPE, quantize="rotated-int8"), capsys))
    assert plain
    assert rotated
    assert 0.5 < float(rotated[1]) < float(plain[1]) < 30
    assert "changes the loss" not in header(replace(RECIPE, quantize=None), capsys)


def test_it_is_measured_on_the_first_tokens_and_once(monkeypatch: pytest.MonkeyPatch):
    base = load_base(RECIPE)
    texts = [Example(range(5, 105), ()), Example((7,), ()), Example(range(40, 90), ())]
    format_cost.print_format_cost(RECIPE, base, texts)
    (path,) = cache_folder("format_cost").glob("*/cost.json")
    rows = [[*range(5, 105)], [*range(40, 67)]]  # 100, 1 and 27 tokens
    losses = [fgpt.nll(base, fgpt.Batch(x[:-1], x[1:], torch.ones(len(x) - 1)))[0] for x in map(torch.tensor, rows)]
    assert float(sum(losses)) / (99 + 26) == pytest.approx(json.loads(path.read_text())["loss"], rel=1e-3)
    monkeypatch.setattr(format_cost, "measure_cost", None)
    format_cost.print_format_cost(RECIPE, base, texts)
    path.write_text("{")
    with pytest.raises(TypeError):
        format_cost.print_format_cost(RECIPE, base, texts)


def test_what_is_not_used_is_deleted():
    base = load_base(RECIPE)
    for first in (5, 105):
        format_cost.print_format_cost(RECIPE, base, [Example(range(first, first + 9), ())])
        folders = [*cache_folder("format_cost").iterdir()]
        assert len(folders) == 1
        os.utime(folders[0], (0, 0))


def test_where_the_full_base_does_not_fit_the_header_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(format_cost, "free_memory", lambda device: 30_000_000)  # nano takes 17 MB
    assert "what int8 costs is not measured: the full base does not fit beside it" in header(RECIPE, capsys)


@pytest.mark.slow
def test_doctor_measures_its_rows(capsys: pytest.CaptureFixture[str]):
    doctor.run(RECIPE)
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(r"int8 changes the loss by .* and a LoRA's first gradient by .* %, on these rows", printed)
