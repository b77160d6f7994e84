"""LoRA on GPT-2 against PEFT: logits, gradients, files both ways."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import SharedData, close, gpt2_shape, hf_gpt2, load_hf_model, same, tiny, with_noise
from builders.peft_adapters import (
    TOKENS,
    Y,
    assert_logits_agree,
    peft_gpt2,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.func import grad
from torch.nn import functional as F

import fgpt
from fgpt.tree import leaves

BATCH = fgpt.Batch(TOKENS, Y, torch.ones(2, 9))


MODULES = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}


def loss_of(params: fgpt.GPT) -> Callable[[fgpt.Adapters], Tensor]:
    return lambda adapters: fgpt.loss(fgpt.adapt(params, adapters), BATCH)


def peft_model(**options: Any) -> Any:
    """A PEFT LoRA on every linear layer of a GPT-2, moved away from the identity."""
    targets = {"r": 4, "lora_alpha": 8, "target_modules": list(MODULES), "fan_in_fan_out": True}
    return peft_gpt2(peft.LoraConfig(**targets | options))


def test_logits_and_gradients_are_pefts(tmp_path: Path):
    model = peft_model()
    params = fgpt.fuse_qkv(load_hf_model(hf_gpt2(), tmp_path))
    reference = {n: p for n, p in model.named_parameters() if "lora_" in n}
    prefix = "base_model.model.transformer.h"

    def pair(i: int, module: str) -> list[Tensor]:
        return [reference[f"{prefix}.{i}.{module}.lora_{side}.default.weight"] for side in "AB"]

    paths = {f"blocks.{i}.{path}": (i, module) for i in range(2) for module, path in MODULES.items()}
    adapters: Any = {}
    for path, at in paths.items():
        a, b = (x.detach() for x in pair(*at))
        adapters[path] = fgpt.LoRA(a, b, 8.0)
    logits = model(TOKENS).logits
    close(fgpt.functional_call(fgpt.apply, (params, adapters), TOKENS), logits.detach(), 1e-5)
    F.cross_entropy(logits.flatten(0, 1), Y.flatten()).backward()
    grads: Any = grad(loss_of(params))(adapters)
    for path, at in paths.items():
        a, b = (p.grad for p in pair(*at))
        assert min(x.abs().max() for x in (a, b) if x is not None) > 1e-3
        close((grads[path].a, grads[path].b), (a, b), 1e-5)


@pytest.mark.parametrize("target", [r".*\.qkv", r"blocks\.1\.attn\.qkv|blocks\.\d+\.(attn\.o|mlp\..*)"])
def test_our_file_in_peft(target: str, tmp_path: Path):
    params = fgpt.fuse_qkv(load_hf_model(hf_gpt2(), tmp_path / "base"))
    adapters: Any = with_noise(fgpt.lora(params, fgpt.key(0), rank=3, alpha=5, target=target))
    fgpt.save_peft(adapters, params, tmp_path / "adapter", "base")
    model = peft.PeftModel.from_pretrained(hf_gpt2(), tmp_path / "adapter").eval()
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == fgpt.num_trainable(adapters)
    assert_logits_agree(params, adapters, model)
    reloaded: Any = fgpt.load_peft(tmp_path / "adapter", params)
    assert same(reloaded, adapters)
    assert {p: x.scale for p, x in reloaded.items()} == pytest.approx({p: x.scale for p, x in adapters.items()})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn.c_attn": 2, r"h\.1\.mlp\.c_fc": 5}, "alpha_pattern": {"mlp.c_proj": 3}},
        {"rank_pattern": {"attn.c_attn": 2}, "alpha_pattern": {"attn.c_attn": 32}, "use_rslora": True},
    ],
)
def test_pefts_file_with_us(options: dict[str, Any], tmp_path: Path):
    model = peft_model(**options)
    model.save_pretrained(tmp_path / "adapter")
    params = fgpt.fuse_qkv(load_hf_model(hf_gpt2(), tmp_path / "base"))
    adapters = fgpt.load_peft(tmp_path / "adapter", params)
    assert fgpt.num_trainable(adapters) == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert_logits_agree(params, adapters, model)


def test_q_and_v_of_unequal_rank_and_alpha_travel_stacked(tmp_path: Path):
    """PEFT sees one exact LoRA on c_attn; we get back the adapters that we saved."""
    params = load_hf_model(hf_gpt2(), tmp_path / "base")
    adapters = with_noise(
        fgpt.lora(params, fgpt.key(0), 2, 8, r"blocks\.\d+\.attn\.q")
        | fgpt.lora(params, fgpt.key(0), 3, 6, r"blocks\.0\.attn\.v")
        | fgpt.lora(params, fgpt.key(0), 4, 2, r"blocks\.1\.attn\.(k|v)")
    )
    fgpt.save_peft(adapters, params, tmp_path / "adapter", "base")
    model = peft.PeftModel.from_pretrained(hf_gpt2(), tmp_path / "adapter").eval()
    assert_logits_agree(params, adapters, model)
    reloaded: Any = fgpt.load_peft(tmp_path / "adapter", params)
    assert reloaded.keys() == adapters.keys()
    for path, x in adapters.items():
        assert torch.equal(reloaded[path].a, x.a)
        close(reloaded[path].scale * reloaded[path].b, x.scale * x.b, 1e-7)
    assert_logits_agree(params, reloaded, model)
    assert_logits_agree(fgpt.fuse_qkv(params), fgpt.load_peft(tmp_path / "adapter", fgpt.fuse_qkv(params)), model)


def test_stacking_is_bitwise_where_ranks_and_alphas_are_equal(tmp_path: Path):
    params = tiny()
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), 4, 8, r"blocks\.\d+\.attn\.(q|v)"))
    fgpt.save_peft(adapters, params, tmp_path, "base")
    reloaded: Any = fgpt.load_peft(tmp_path, params)
    assert same(reloaded, adapters)
    assert [x.alpha for x in reloaded.values()] == [x.alpha for x in adapters.values()]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)  # r' = 2r and alpha' = 2 alpha


def test_a_real_adapter(shared_data: SharedData):
    folder = shared_data("gpt2-lora-adapter")
    adapters: Any = fgpt.load_peft(folder, fgpt.fuse_qkv(gpt2_shape(12, 12, 768)))
    stored = load_file(folder / "adapter_model.safetensors")
    assert fgpt.num_trainable(adapters) == 811_008
    assert sum(len(leaves(x)) for x in adapters.values()) == len(stored)
    for name, path in MODULES.items():
        for i in range(12 if name != "mlp.c_fc" else 0):
            lora = adapters[f"blocks.{i}.{path}"]
            a, b = (stored[f"base_model.model.transformer.h.{i}.{name}.lora_{side}.weight"] for side in "AB")
            assert same(lora, fgpt.LoRA(a, b, 16.0))
            assert lora.scale == 2.0
    with pytest.raises(fgpt.InputError, match=r"fuse_qkv\(params\) first"):
        fgpt.load_peft(folder, gpt2_shape(12, 12, 768))
