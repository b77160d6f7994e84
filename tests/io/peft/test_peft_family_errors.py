"""Adapters that fit no module of a family are refused."""

from pathlib import Path

import pytest
from builders import tiny, with_noise
from builders.hf_models import hf_model, save_and_load
from builders.peft_adapters import assert_adapters_identical
from safetensors.torch import load_file, save_file

import fgpt
from fgpt.cli import run_dir


@pytest.mark.parametrize("name", ["gptj", "neox", "llama"])
def test_what_peft_cannot_hold_is_refused(name: str, tmp_path: Path):
    params = save_and_load(hf_model(name))
    for adapters in (
        fgpt.dora(params, fgpt.key(0), target="wte"),
        fgpt.trainable_leaves(params, r"blocks\.0\.attn\.o\.w"),
        fgpt.trainable_leaves(params, r".*\.(q|up)\.b|ln_f.*")
        if name != "llama"
        else fgpt.trainable_leaves(params, "head.*"),
    ):
        with pytest.raises(fgpt.InputError, match=r"PEFT has no place .*save_adapters\(adapters, path\)"):
            fgpt.save_peft(adapters, params, tmp_path / "adapter", "base")


def test_a_model_of_no_family(tmp_path: Path):
    params = tiny(gated_mlp=True)
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), 3))
    with pytest.raises(fgpt.InputError, match=r"family .* of none: save_adapters\(adapters, path\) keeps") as caught:
        fgpt.save_peft(adapters, params, tmp_path / "peft", "base")
    assert "\n" not in str(caught.value)
    assert run_dir.save_tuned(tmp_path, params, adapters, "base") == tmp_path / "adapter"
    assert_adapters_identical(fgpt.load_adapters(tmp_path / "adapter" / run_dir.ADAPTERS, params), adapters)
    plain = tiny()
    fgpt.save_peft(fgpt.lora(plain, fgpt.key(0), 3), plain, tmp_path / "peft", "base")
    with pytest.raises(fgpt.InputError, match="this model is of none"):
        fgpt.load_peft(tmp_path / "peft", params)


def test_a_file_of_another_family(tmp_path: Path):
    bases: dict[str, fgpt.GPT] = {name: save_and_load(hf_model(name)) for name in ("gptj", "neox", "llama")} | {
        "gpt2": tiny()
    }
    for name, params in bases.items():
        at = tmp_path / name
        fgpt.save_peft(fgpt.lora(params, fgpt.key(0), 3), params, at, "base")
        for other in bases.values():
            if other is not params:
                with pytest.raises(fgpt.InputError, match=r"adapter on \S+, which is no layer of this model") as caught:
                    fgpt.load_peft(at, other)
                assert str(at) in str(caught.value)


def test_a_block_that_is_not_there(tmp_path: Path):
    more = save_and_load(hf_model("llama", num_hidden_layers=3))
    fgpt.save_peft(fgpt.lora(more, fgpt.key(0), 3), more, tmp_path, "base")
    with pytest.raises(fgpt.InputError, match=r"adapter on model\.layers\.2\.\S+, which is no layer"):
        fgpt.load_peft(tmp_path, save_and_load(hf_model("llama")))


@pytest.mark.parametrize("rows", [94, 0, 48])
def test_rows_that_are_no_heads_of_a_neox(rows: int, tmp_path: Path):
    params = fgpt.fuse_qkv(save_and_load(hf_model("neox")))
    fgpt.save_peft(fgpt.lora(params, fgpt.key(0), 3), params, tmp_path, "base")
    file = tmp_path / "adapter_model.safetensors"
    tensors = {n: x[:rows].clone() if "lora_B" in n else x for n, x in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(fgpt.InputError, match=rf"fits a weight of \[{rows}, 32\]"):
        fgpt.load_peft(tmp_path, params)
