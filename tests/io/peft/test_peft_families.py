"""PEFT's files of every family: theirs with us, ours in PEFT and back."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import close, tokens, with_noise
from builders.hf_models import VARIANTS, hf_model, save_and_load
from builders.peft_adapters import ADAPTERS_OF_SOME_PROJECTIONS, OUR_ADAPTERS, assert_adapters_identical
from builders.peft_families import linear_modules, norm_modules
from safetensors.torch import load_file, save_file

import fgpt

X = tokens(31, 2, 9)
TRAINED = "lora_|ia3_|ln_tuning"
"""What PEFT has trained, among the names of its model's parameters."""


def peft_model_of(model: Any, config: Any) -> Any:
    """`model` under PEFT's adapters of `config`, each moved away from the identity."""
    wrapped = peft.get_peft_model(model, config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if re.search(TRAINED, name):
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return wrapped.eval()


def trained_tensors_of(model: Any, at: Path) -> Path:
    model.save_pretrained(at)
    return at


def agrees(params: fgpt.GPT, adapters: fgpt.Adapters, model: Any) -> None:
    """Asserts that ours and theirs give the same logits, and that the adapters change them."""
    with torch.no_grad():
        got = fgpt.apply(fgpt.adapt(params, adapters), X)
        close(got, model(X).logits, 1e-5)
        assert (got - fgpt.apply(params, X)).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------------------- theirs


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6}
DOWN = r".*(fc_out|dense_4h_to_h|down_proj)"
THEIRS = {
    "lora": lambda m: peft.LoraConfig(**LORA, target_modules=linear_modules(m)),
    "rslora, here and there": lambda m: peft.LoraConfig(
        **LORA,
        target_modules=linear_modules(m, r".*\.1\..*|lm_head"),
        use_rslora=True,
        rank_pattern={re.escape(n): 2 for n in linear_modules(m, r".*\.1\.mlp.*")},
        alpha_pattern={re.escape(n): 5 for n in linear_modules(m, r".*\.1\.mlp\.(fc_in|dense_h_to_4h|up_proj)")},
    ),
    "dora": lambda m: peft.LoraConfig(**LORA, target_modules=linear_modules(m), use_dora=True, lora_dropout=0.2),
    "ia3": lambda m: peft.IA3Config(target_modules=linear_modules(m), feedforward_modules=linear_modules(m, DOWN)),
    "norms": lambda m: peft.LNTuningConfig(target_modules=norm_modules(m)),
    "a norm": lambda m: peft.LNTuningConfig(target_modules=norm_modules(m)[1:2]),
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("name", VARIANTS)
def test_theirs_with_us(name: str, kind: str, tmp_path: Path):
    plain = hf_model(name)
    params = save_and_load(plain)
    model = peft_model_of(plain, THEIRS[kind](plain))
    at = trained_tensors_of(model, tmp_path)
    in_one = name.startswith("neox") and "ora" in kind
    base = fgpt.fuse_qkv(params) if in_one else params
    adapters = fgpt.load_peft(at, base)
    agrees(base, adapters, model)
    if in_one:
        with pytest.raises(fgpt.InputError, match=r"fuse_qkv\(params\) first"):
            fgpt.load_peft(at, params)
    elif not name.startswith("neox"):
        count = sum(p.numel() for n, p in model.named_parameters() if re.search(TRAINED, n))
        assert fgpt.num_trainable(adapters) == count


@pytest.mark.parametrize("name", ["gptj", "neox", "llama"])
def test_a_model_without_its_head(name: str, tmp_path: Path):
    """What PEFT trained on AutoModel has names without the family's prefix."""
    params, bare = save_and_load(hf_model(name)), hf_model(name).base_model
    params = fgpt.fuse_qkv(params) if name == "neox" else params
    model = peft_model_of(bare, peft.LoraConfig(**LORA, target_modules=linear_modules(bare)))
    names = load_file(trained_tensors_of(model, tmp_path) / "adapter_model.safetensors")
    assert all(n.startswith(("base_model.model.h.", "base_model.model.layers.")) for n in names)
    adapters = fgpt.load_peft(tmp_path, params)
    with torch.no_grad():
        close(fgpt.hidden(fgpt.adapt(params, adapters), X), model(X).last_hidden_state, 1e-5)


def test_the_head_of_a_neox_under_its_old_name(tmp_path: Path):
    """transformers before 5.14 has it as embed_out."""
    model = peft_model_of(hf_model("neox"), peft.LoraConfig(**LORA, target_modules=["lm_head"]))
    file = trained_tensors_of(model, tmp_path) / "adapter_model.safetensors"
    save_file({n.replace("lm_head", "embed_out"): x for n, x in load_file(file).items()}, file, {"format": "pt"})
    params = save_and_load(hf_model("neox"))
    adapters = fgpt.load_peft(tmp_path, params)
    assert adapters.keys() == {"head"}
    agrees(params, adapters, model)


# --------------------------------------------------------------------------------------------------------------- ours


def in_peft_and_back(name: str, params: fgpt.GPT, adapters: fgpt.Adapters, at: Path) -> fgpt.Adapters:
    fgpt.save_peft(adapters, params, at, "base")
    model = peft.PeftModel.from_pretrained(hf_model(name), at).eval()
    agrees(params, adapters, model)
    count = sum(p.numel() for n, p in model.named_parameters() if re.search(TRAINED, n))
    assert count >= fgpt.num_trainable(adapters)
    reloaded = fgpt.load_peft(at, params)
    agrees(params, reloaded, model)
    return reloaded


@pytest.mark.parametrize("kind", OUR_ADAPTERS | ADAPTERS_OF_SOME_PROJECTIONS)
@pytest.mark.parametrize("name", ["gptj", "neox", "llama, one kv head", "llama, biases", "qwen2", "qwen3"])
def test_ours_in_peft_and_back(name: str, kind: str, tmp_path: Path):
    params = save_and_load(hf_model(name))
    adapters = with_noise((OUR_ADAPTERS | ADAPTERS_OF_SOME_PROJECTIONS)[kind](params), 0.1)
    reloaded: Any = in_peft_and_back(name, params, adapters, tmp_path)
    if "unequal" in kind:  # B takes up the quotient of the scales, but for rounding
        close(reloaded, adapters, 1e-7)
    else:
        assert_adapters_identical(reloaded, adapters)


@pytest.mark.parametrize("kind", OUR_ADAPTERS)
def test_q_k_and_v_of_a_neox_in_one(kind: str, tmp_path: Path):
    """Their rows alternate by heads there, and here they do not: to the bit."""
    params = fgpt.fuse_qkv(save_and_load(hf_model("neox")))
    adapters = with_noise(OUR_ADAPTERS[kind](params), 0.1)
    assert_adapters_identical(in_peft_and_back("neox", params, adapters, tmp_path), adapters)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "tied" not in name])
def test_the_head(name: str, tmp_path: Path):
    params = save_and_load(hf_model(name))
    adapters = with_noise(fgpt.dora(params, fgpt.key(0), 3, target="head"), 0.1)
    assert_adapters_identical(in_peft_and_back(name, params, adapters, tmp_path), adapters)


def test_norms_of_q_and_k(tmp_path: Path):
    params = save_and_load(hf_model("qwen3"))
    adapters = with_noise(fgpt.trainable_leaves(params, r".*_norm\.w|ln_f\.w"), 0.1)
    assert len(adapters) == 5
    assert_adapters_identical(in_peft_and_back("qwen3", params, adapters, tmp_path), adapters)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["norm", "self_attn.k_norm", "self_attn.q_norm"]
