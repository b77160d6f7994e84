"""Adapters against PEFT, on the same weights, and PEFT's files both ways."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import SharedData, close, gpt2_shape, hf_gpt2, load_hf_model, same, tiny, with_noise
from builders.peft_adapters import (
    ADAPTERS_OF_SOME_PROJECTIONS,
    ATTN,
    OUR_ADAPTERS,
    TOKENS,
    Y,
    assert_adapters_identical,
    assert_logits_agree,
    dora,
    lora,
    peft_gpt2,
    rs_dora,
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


# --------------------------------------------------------------------------------------------------------------- PEFT


def test_logits_and_gradients_are_pefts(tmp_path: Path):
    model = peft_model()
    params = fgpt.fuse_qkv(load_hf_model(hf_gpt2(), tmp_path))
    theirs = {n: p for n, p in model.named_parameters() if "lora_" in n}
    prefix = "base_model.model.transformer.h"

    def pair(i: int, module: str) -> list[Tensor]:
        return [theirs[f"{prefix}.{i}.{module}.lora_{side}.default.weight"] for side in "AB"]

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
    again: Any = fgpt.load_peft(tmp_path / "adapter", params)
    assert same(again, adapters)
    assert {p: x.scale for p, x in again.items()} == pytest.approx({p: x.scale for p, x in adapters.items()})


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
    again: Any = fgpt.load_peft(tmp_path / "adapter", params)
    assert again.keys() == adapters.keys()
    for path, x in adapters.items():
        assert torch.equal(again[path].a, x.a)
        close(again[path].scale * again[path].b, x.scale * x.b, 1e-7)
    assert_logits_agree(params, again, model)
    assert_logits_agree(fgpt.fuse_qkv(params), fgpt.load_peft(tmp_path / "adapter", fgpt.fuse_qkv(params)), model)


def test_stacking_is_bitwise_where_ranks_and_alphas_are_equal(tmp_path: Path):
    params = tiny()
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), 4, 8, r"blocks\.\d+\.attn\.(q|v)"))
    fgpt.save_peft(adapters, params, tmp_path, "base")
    again: Any = fgpt.load_peft(tmp_path, params)
    assert same(again, adapters)
    assert [x.alpha for x in again.values()] == [x.alpha for x in adapters.values()]
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
    with pytest.raises(fgpt.InputError, match=r"fuse\(params\) first"):
        fgpt.load_peft(folder, gpt2_shape(12, 12, 768))


# -------------------------------------------------------------------------------------------------- every format, ours


@pytest.mark.parametrize(
    ("kind", "whole"),
    [(k, w) for k in OUR_ADAPTERS for w in (False, True)] + [(k, False) for k in ADAPTERS_OF_SOME_PROJECTIONS],
)
def test_ours_in_peft_and_back(kind: str, whole: bool, tmp_path: Path):
    params = load_hf_model(hf_gpt2(), tmp_path / "base")
    params = fgpt.fuse_qkv(params) if whole else params
    adapters = with_noise((OUR_ADAPTERS | ADAPTERS_OF_SOME_PROJECTIONS)[kind](params), 0.1)
    fgpt.save_peft(adapters, params, tmp_path / "adapter", "base")
    model = peft.PeftModel.from_pretrained(hf_gpt2(), tmp_path / "adapter").eval()
    assert_logits_agree(params, adapters, model)
    again: Any = fgpt.load_peft(tmp_path / "adapter", params)
    if "unequal" in kind:  # B takes up the quotient of the scales, and gives it back but for rounding
        close(again, adapters, 1e-7)
        again = {
            path: fgpt.DoRA(fgpt.LoRA(x.lora.a, adapters[path].lora.b, x.lora.alpha), x.m) for path, x in again.items()
        }
    assert_adapters_identical(again, adapters)
    if not whole:
        assert_logits_agree(fgpt.fuse_qkv(params), fgpt.load_peft(tmp_path / "adapter", fgpt.fuse_qkv(params)), model)


def test_peft_reads_our_options(tmp_path: Path):
    params = tiny()
    fgpt.save_peft(rs_dora(params), params, tmp_path, "base")
    config: Any = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (config.use_rslora, config.use_dora, config.lora_dropout) == (False, True, 0.1)
    assert config.lora_alpha / config.r == pytest.approx(3 / 3**0.5, rel=1e-15)  # as rank-stabilised LoRA has it
    fgpt.save_peft(fgpt.ia3(params), params, tmp_path, "base")
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (config.target_modules, config.feedforward_modules) == ({"attn.c_attn", "mlp.c_proj"}, {"mlp.c_proj"})


# ------------------------------------------------------------------------------------------------ every format, theirs


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": True}


IA3: dict[str, Any] = {"fan_in_fan_out": True}


THEIRS = {
    "dora": peft.LoraConfig(**LORA, use_dora=True, target_modules=["attn.c_attn", "mlp.c_fc"], lora_dropout=0.2),
    "dora of c_proj": peft.LoraConfig(**LORA, use_dora=True, use_rslora=True, target_modules=["c_proj"]),
    "rslora of c_fc": peft.LoraConfig(
        **LORA, use_rslora=True, target_modules=["c_fc"], rank_pattern={"h.0.mlp.c_fc": 2}
    ),
    "ia3": peft.IA3Config(**IA3, target_modules=["attn.c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    "ia3 by pattern": peft.IA3Config(
        **IA3, target_modules=r".*\.c_(attn|fc)", feedforward_modules=r".*1\.(attn|mlp)\..*"
    ),
    "norms": peft.LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"]),
    "a norm": peft.LNTuningConfig(target_modules=["h.1.ln_2"]),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_theirs_with_us(kind: str, tmp_path: Path):
    model = peft_gpt2(THEIRS[kind])
    model.save_pretrained(tmp_path / "adapter")
    params = load_hf_model(hf_gpt2(), tmp_path / "base")
    for base in (fgpt.fuse_qkv(params), params):
        if kind == "dora" and base is params:
            with pytest.raises(fgpt.InputError, match=r"fuse\(params\) first"):
                fgpt.load_peft(tmp_path / "adapter", base)
            continue
        adapters = fgpt.load_peft(tmp_path / "adapter", base)
        assert_logits_agree(base, adapters, model)
        if base is not params or not kind.startswith("ia3"):
            numbers = sum(p.numel() for n, p in model.named_parameters() if re.search("lora_|ia3_|ln_tuning", n))
            assert fgpt.num_trainable(adapters) == numbers


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "make",
    [
        lambda p: lora(p, target=ATTN) | fgpt.trainable_leaves(p, r".*\.o\.b"),
        lambda p: lora(p, target=ATTN) | dora(p, target=r".*\.up"),
        lambda p: fgpt.trainable_leaves(p, r".*\.q\.b"),
        lambda p: dora(p, target="wte"),
        lambda p: lora(p, target=ATTN) | lora(p, dropout=0.1, target=r".*\.up"),
        lambda p: lora(p, target=r".*\.q") | lora(p, dropout=0.1, target=r".*\.v"),
        lambda p: fgpt.ia3(p, r".*\.o", r".*\.o"),
        lambda p: fgpt.ia3(p, None, r".*\.k"),
        lambda p: {},
    ],
)
def test_what_peft_cannot_hold_is_refused(make: Callable[[fgpt.GPT], fgpt.Adapters], tmp_path: Path):
    params = tiny()
    with pytest.raises(fgpt.InputError, match=r"save_adapters\(adapters, path\)"):
        fgpt.save_peft(make(params), params, tmp_path / "adapter", "base")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_of_a_changed_base_is_refused(tmp_path: Path):
    """PiSSA takes its first product out of the base: without that, W + sBA is another model."""
    config = peft.LoraConfig(**LORA, target_modules=["c_fc"], init_lora_weights="pissa")
    peft_gpt2(config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(fgpt.InputError, match="init_lora_weights 'pissa' belongs to a base that was changed"):
        fgpt.load_peft(tmp_path / "adapter", tiny())


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("dora", {"use_dora": False}, "needs lora_A and lora_B: .* got .*lora_magnitude_vector"),
        ("dora", {"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is \[1, 2\]"),
        ("dora", {"lora_dropout": 1.0}, "expected lora_dropout from 0 to less than 1, got 1.0"),
        ("dora", {"lora_alpha": None}, "expected a number for lora_alpha, got None"),
        ("dora", {"alpha_pattern": {"(": 2}}, "not a regular expression"),
        ("dora", {"alpha_pattern": [2]}, "expected an object for alpha_pattern"),
        ("dora", {"peft_type": "IA3"}, "lora_A.weight is none of peft_type 'IA3'"),
        ("ia3", {"peft_type": "VERA"}, "expected peft_type 'LORA', 'IA3', 'LN_TUNING', got 'VERA'"),
    ],
)
def test_a_file_that_says_something_else_is_refused(kind: str, change: dict[str, Any], expected: str, tmp_path: Path):
    peft_gpt2(THEIRS[kind]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(fgpt.InputError, match=expected) as caught:
        fgpt.load_peft(tmp_path, fgpt.fuse_qkv(tiny()))
    assert "\n" not in str(caught.value)


def test_tuning_of_a_matrix_is_no_norm(tmp_path: Path):
    """attn.c_proj is square, and transposed: read as it is, it would fit, and be another model."""
    peft_gpt2(peft.LNTuningConfig(target_modules=["attn.c_proj"])).save_pretrained(tmp_path)
    with pytest.raises(fgpt.InputError, match=r"attn\.c_proj is no norm"):
        fgpt.load_peft(tmp_path, tiny())
