"""Initializations beside PEFT's `init_lora_weights`, and trained adapters that open in PEFT over the original base."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import close, hf_gpt2, load_hf_model
from builders.hf_models import hf_model, save_and_load
from builders.initialized import CHANGE_THE_BASE, TOKENS, weight_at
from peft.tuners.lora.config import EvaConfig, LoraGAConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga

import fgpt
from fgpt.tree import tree_map

LLAMA = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "mlp.gate",
    "mlp.down_proj": "mlp.down",
}
GPT2 = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}


def target_of(modules: dict[str, str]) -> str:
    return r"blocks\.\d+\.(" + "|".join(modules.values()) + ")"


def peft_layers(model: Any, modules: dict[str, str]) -> dict[str, Any]:
    """PEFT's layers by our paths."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        match = re.search(rf"\.(\d+)\.({'|'.join(modules)})$", name)
        if match and hasattr(module, "base_layer"):
            found[f"blocks.{match[1]}.{modules[match[2]]}"] = module
    return found


def factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_llama_under_pissa_and_olora(method: Any, rs: bool) -> None:
    params, adapters = getattr(fgpt, method)(save_and_load(hf_model("llama")), 3, 5.0, target_of(LLAMA), rs)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        init_lora_weights=method,
        target_modules=list(LLAMA),
        use_rslora=rs,
    )
    theirs = peft_layers(peft.get_peft_model(hf_model("llama"), config), LLAMA)
    assert theirs.keys() == adapters.keys()
    for path, layer in theirs.items():
        a, b = factors(layer)
        close(adapters[path].b @ adapters[path].a, b @ a, 1e-5)
        close(weight_at(params, path), layer.base_layer.weight.detach(), 1e-5)
        assert adapters[path].scale == pytest.approx(layer.scaling["default"])


def test_gpt2_under_pissa(tmp_path: Path) -> None:
    before = fgpt.fuse_qkv(load_hf_model(hf_gpt2(), tmp_path))
    params, adapters = fgpt.pissa(before, 3, 5.0, target_of(GPT2))
    config = peft.LoraConfig(
        r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=list(GPT2), fan_in_fan_out=True
    )
    theirs = peft_layers(peft.get_peft_model(hf_gpt2(), config), GPT2)
    assert theirs.keys() == adapters.keys()
    for path, layer in theirs.items():
        a, b = factors(layer)
        x: Any = adapters[path]
        close(x.b @ x.a, b @ a, 1e-5)
        close(weight_at(params, path), layer.base_layer.weight.detach().T, 1e-5)


def test_llama_under_lora_ga() -> None:
    """The singular vectors are PEFT's up to sign. PEFT's B is multiplied by the singular values, its A by nothing."""
    rank, model = 8, hf_model("llama")
    options: Any = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig(direction="ArB2r")}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=5,
        **options,
        target_modules=list(LLAMA),
    )
    before = save_and_load(model)
    preprocess_loraga(model, config, lambda: model(TOKENS, labels=TOKENS).loss.backward())
    theirs = peft_layers(peft.get_peft_model(model, config), LLAMA)
    text = fgpt.Batch(TOKENS[:, :-1], TOKENS[:, 1:], torch.ones(3, 8))
    _, adapters = fgpt.lora_ga(before, lambda p: fgpt.loss(p, text), rank, 5.0, target_of(LLAMA))
    assert theirs.keys() == adapters.keys()
    for path, layer in theirs.items():
        a, b = factors(layer)
        x: Any = adapters[path]
        c = layer.base_layer.weight.shape[0] ** 0.25 / 4
        close((x.a @ a.T).abs() / c, torch.eye(rank), 1e-3)
        close((x.b.T @ (b / b.norm(dim=0))).abs() / c, torch.eye(rank), 1e-3)


def test_eva_where_the_inputs_have_no_mean() -> None:
    """PEFT takes the directions of x - mean(x). Each token here has one whose embedding is its negative."""
    model = hf_model("llama")
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table[15:30] = -table[:15]
        model.model.layers[0].input_layernorm.weight.copy_(0.7 ** torch.arange(32))  # no two directions are as strong
    text = torch.arange(30).view(2, 15)
    before = save_and_load(model)
    config = peft.LoraConfig(
        r=3, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), target_modules=r".*\.0\.self_attn\.q_proj"
    )
    wrapped = peft.get_peft_model(model, config)
    texts = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    initialize_lora_eva_weights(wrapped, [texts], show_progress_bar=False)
    a, b = factors(peft_layers(wrapped, LLAMA)["blocks.0.attn.q"])
    _, adapters = fgpt.eva(
        before, [fgpt.Batch(text, text, torch.ones(2, 15))], 3, target=r"blocks\.0\.attn\.q", rho=1.0
    )
    x: Any = adapters["blocks.0.attn.q"]
    close((x.a @ a.T).abs(), torch.eye(3), 1e-3)
    assert x.b.abs().max() == b.abs().max() == 0


@pytest.mark.parametrize("method", CHANGE_THE_BASE)
def test_the_difference_from_the_initial_adapters_opens_in_peft_over_the_original_base(
    method: str, tmp_path: Path
) -> None:
    before = save_and_load(hf_model("llama"))
    params, initial = CHANGE_THE_BASE[method](before, rank=3, rs=True)
    rng = torch.Generator().manual_seed(1)
    trained = tree_map(lambda x: x + 0.1 * torch.randn(x.shape, generator=rng), initial)
    fgpt.save_peft(fgpt.combine(before, [trained, initial], weights=[1, -1]), before, tmp_path, "base")
    model = peft.PeftModel.from_pretrained(hf_model("llama"), tmp_path).eval()
    with torch.no_grad():
        logits = model(TOKENS).logits
    close(fgpt.functional_call(fgpt.apply, (params, trained), TOKENS), logits, 1e-4)
    assert (logits - fgpt.apply(before, TOKENS)).abs().max() > 0.1
