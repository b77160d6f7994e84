"""Any union of adapters comes back bit by bit; what a run keeps is what it tuned."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import close, tokens, with_noise
from builders.params_files import assert_trees_identical, wide_gpt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

import fgpt
from fgpt.cli import run_dir
from fgpt.tree import astype, tree_map

X = tokens(31, 2, 9)


# ------------------------------------------------------------------------------------------------------- any adapters


def union(params: fgpt.GPT) -> fgpt.Adapters:
    """Every kind, and a LoRA whose B and a bias whose path would both be called blocks.0.attn.q.b."""
    key = fgpt.key(0)
    return with_noise(
        fgpt.lora(params, key, 3, target=r"blocks\.0\.attn\.q", rs=True, dropout=0.1)
        | fgpt.trainable_leaves(params, r"blocks\.0\.attn\.q\.b|.*ln_.*")
        | fgpt.dora(params, key, 2, target=r"blocks\.1\.attn\..|wte")
        | fgpt.ia3(params, r".*\.0\.attn\.k", r".*\.down")
    )


def test_any_union_of_adapters_comes_back_bit_by_bit(tmp_path: Path):
    params = wide_gpt()
    adapters = union(params)
    fgpt.save_adapters(adapters, tmp_path / "a.safetensors")
    reloaded = fgpt.load_adapters(tmp_path / "a.safetensors", params)
    assert_trees_identical(reloaded, adapters)
    whole = load_file(tmp_path / "a.safetensors")
    whole["blocks.0.attn.q/b"] = torch.zeros(64, 4)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        save_file(whole, tmp_path / "b.safetensors", file.metadata())
    with pytest.raises(fgpt.InputError, match=r"blocks\.0\.attn\.q/b: expected Float.*out rank.*got .* \[64, 4\]"):
        fgpt.load_adapters(tmp_path / "b.safetensors", params)
    other = wide_gpt(d_model=32)
    with pytest.raises(fgpt.InputError, match=r"a\.safetensors: .* but the base has"):
        fgpt.load_adapters(tmp_path / "a.safetensors", other)
    fgpt.save(fgpt.quantize(params), tmp_path)
    with pytest.raises(fgpt.InputError, match="expected adapters, got GPT"):
        fgpt.load_adapters(tmp_path / "fgpt.safetensors", params)


# ---------------------------------------------------------------------------------------------------- what a run keeps


KEPT: dict[str, tuple[Callable[[fgpt.GPT], fgpt.Adapters], str]] = {
    "lora": (lambda p: fgpt.lora(p, fgpt.key(0), target=r".*\.(q|v)"), "adapter/adapter_model.safetensors"),
    "dora": (lambda p: fgpt.dora(p, fgpt.key(0), target=r".*\.(q|v)"), "adapter/adapter_model.safetensors"),
    "ia3": (fgpt.ia3, "adapter/adapter_model.safetensors"),
    "norms": (lambda p: fgpt.trainable_leaves(p, r".*ln_.*"), "adapter/adapter_model.safetensors"),
    "biases": (lambda p: fgpt.trainable_leaves(p, r".*\.b"), "adapter/adapters.safetensors"),
    "a union": (union, "adapter/adapters.safetensors"),
    "full": (fgpt.trainable_leaves, "model/model.safetensors"),
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_run_keeps_is_what_it_tuned(kind: str, dtype: torch.dtype, tmp_path: Path):
    make, file = KEPT[kind]
    base = astype(wide_gpt(), dtype)
    adapters = with_noise(make(base), 0.1)
    tuned = fgpt.adapt(base, adapters)
    released = tree_map(lambda x: x.to("meta"), base) if kind == "full" else base  # as training lets go of them
    run_dir.save_tuned(tmp_path, released, adapters, "nano")
    assert (tmp_path / file).is_file()
    reloaded = run_dir.load_tuned(tmp_path, base)
    assert pytree.tree_structure(reloaded) == pytree.tree_structure(tuned)
    close(reloaded, tuned, 1e-6)  # DoRA's row norms may round otherwise where a file puts the tensors
    assert not torch.equal(fgpt.apply(base, X), fgpt.apply(tuned, X))


def test_a_whole_model_goes_where_the_base_is(tmp_path: Path):
    base = wide_gpt()
    run_dir.save_tuned(tmp_path, base, fgpt.trainable_leaves(base), "nano")
    there = tree_map(lambda x: x.to("meta"), astype(base, torch.float16))  # a device that every machine has
    assert {(x.device.type, x.dtype) for x in pytree.tree_leaves(run_dir.load_tuned(tmp_path, there))} == {
        ("meta", torch.float16)
    }


def test_adapters_over_a_quantized_base(tmp_path: Path):
    base = fgpt.quantize(wide_gpt())
    adapters = with_noise(fgpt.lora(base, fgpt.key(0)) | fgpt.trainable_leaves(base, r".*\.b"), 0.1)
    run_dir.save_tuned(tmp_path, base, adapters, "nano")
    assert_trees_identical(run_dir.load_tuned(tmp_path, base), fgpt.adapt(base, adapters))
