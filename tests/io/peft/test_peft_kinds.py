"""Adapters of every kind: ours in PEFT and back, theirs with us."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
from builders import close, hf_gpt2, load_hf_model, tiny, with_noise
from builders.peft_adapters import (
    ADAPTERS_OF_SOME_PROJECTIONS,
    OUR_ADAPTERS,
    PEFT_CONFIGS,
    assert_adapters_identical,
    assert_logits_agree,
    peft_gpt2,
    rs_dora,
)

import fgpt

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
    reloaded: Any = fgpt.load_peft(tmp_path / "adapter", params)
    if "unequal" in kind:  # B takes up the quotient of the scales, and gives it back but for rounding
        close(reloaded, adapters, 1e-7)
        reloaded = {
            path: fgpt.DoRA(fgpt.LoRA(x.lora.a, adapters[path].lora.b, x.lora.alpha), x.m)
            for path, x in reloaded.items()
        }
    assert_adapters_identical(reloaded, adapters)
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


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_theirs_with_us(kind: str, tmp_path: Path):
    model = peft_gpt2(PEFT_CONFIGS[kind])
    model.save_pretrained(tmp_path / "adapter")
    params = load_hf_model(hf_gpt2(), tmp_path / "base")
    for base in (fgpt.fuse_qkv(params), params):
        if kind == "dora" and base is params:
            with pytest.raises(fgpt.InputError, match=r"fuse_qkv\(params\) first"):
                fgpt.load_peft(tmp_path / "adapter", base)
            continue
        adapters = fgpt.load_peft(tmp_path / "adapter", base)
        assert_logits_agree(base, adapters, model)
        if base is not params or not kind.startswith("ia3"):
            numbers = sum(p.numel() for n, p in model.named_parameters() if re.search("lora_|ia3_|ln_tuning", n))
            assert fgpt.num_trainable(adapters) == numbers
