"""What "auto" means on a machine, and that a run records it. A GPU is played by what torch says of one."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fgpt.cli import run_dir
from fgpt.cli.devices import describe_precision, resolve_device, resolve_dtype, resolve_precision
from fgpt.recipes import RECIPES, find

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A GPU with bfloat16; nothing is computed on it. What is set for cuDNN is returned."""
    asked: dict[str, bool] = {"bfloat16": True}
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device=None: empty(*size))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked["bfloat16"])
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: asked.update(cudnn=on))
    return asked


def test_auto_is_bfloat16_on_a_gpu(gpu: dict[str, bool]):
    assert resolve_dtype("auto", CUDA) == torch.bfloat16
    assert resolve_dtype("float32", CUDA) == torch.float32
    recipe = resolve_precision(find("lora-nano"))
    assert (recipe.device, recipe.dtype) == ("auto", "bfloat16")
    assert describe_precision(recipe) == "bfloat16 on cuda"
    assert resolve_precision(replace(find("lora-nano"), dtype="float32")).dtype == "float32"
    gpu["bfloat16"] = False
    assert resolve_precision(find("lora-nano")).dtype == "float32"


def test_auto_is_float32_on_a_cpu():
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


def test_every_recipe_has_a_dtype():
    assert {find(name).dtype for name in RECIPES} == {"auto", "bfloat16"}


def test_cudnn_makes_no_plan_for_each_shape(gpu: dict[str, bool]):
    resolve_device("cpu")
    assert "cudnn" not in gpu
    assert resolve_device("auto") == CUDA
    assert gpu["cudnn"] is False


def test_a_run_that_names_no_dtype_was_trained_in_float32(tmp_path: Path):
    """A pretraining of an earlier version, which had no such option."""
    values: dict[str, Any] = find("tinytiny-pretrain").to_json() | {"kind": "pretraining", "version": 1}
    del values["dtype"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert run_dir.read_run(tmp_path).dtype == "float32"
