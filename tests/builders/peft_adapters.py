"""Adapters of every kind that PEFT has too, and comparisons with PEFT's."""

import re
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch.utils import _pytree as pytree

import fgpt
from builders import close, hf_gpt2, same, tokens
from fgpt.tree import astype

TOKENS, Y = tokens(31, 2, 9), tokens(31, 2, 9, seed=1)


def peft_gpt2(config: Any) -> Any:
    """A GPT-2 under PEFT's adapters of `config`, each moved away from the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(1)  # PEFT draws A from the global generator
        model = peft.get_peft_model(hf_gpt2(), config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if re.search("lora_|ia3_|ln_tuning", name):
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return model.eval()


def assert_logits_agree(params: fgpt.GPT, adapters: fgpt.Adapters, model: Any) -> None:
    """Asserts that ours and theirs give the same logits over an fp64 base, and that the adapters change them."""
    base = astype(params, torch.float64)
    with torch.no_grad():
        got = fgpt.apply(fgpt.adapt(base, adapters), TOKENS)
        close(got, model.double()(TOKENS).logits, 1e-6)
        assert (got - fgpt.apply(base, TOKENS)).abs().max() > 1e-2


def assert_adapters_identical(a: fgpt.Adapters, b: fgpt.Adapters) -> None:
    """Asserts the same adapters: paths, kinds, static fields and, bitwise, tensors."""
    assert same(a, b)
    assert {p: pytree.tree_structure(x) for p, x in a.items()} == {p: pytree.tree_structure(x) for p, x in b.items()}


ATTN, EVERY_MATRIX = r"blocks\.\d+\.attn\.(q|k|v|qkv)", r"blocks\..*"


def lora(params: fgpt.GPT, **options: Any) -> fgpt.Adapters:
    return fgpt.lora(params, fgpt.key(0), **{"rank": 3, "alpha": 5, "target": EVERY_MATRIX} | options)


def dora(params: fgpt.GPT, **options: Any) -> fgpt.Adapters:
    return fgpt.dora(params, fgpt.key(0), **{"rank": 3, "alpha": 5, "target": EVERY_MATRIX} | options)


def rs_dora(params: fgpt.GPT) -> fgpt.Adapters:
    adapters: dict[str, Any] = lora(params, rs=True, dropout=0.1, alpha=3)
    dora_adapters: dict[str, Any] = dora(params)
    return {path: fgpt.DoRA(adapters[path], x.m) for path, x in dora_adapters.items()}


OUR_ADAPTERS: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "lora": lora,
    "rslora": lambda p: lora(p, rs=True),
    "dropout": lambda p: lora(p, dropout=0.25),
    "dora": dora,
    "dora of one block": lambda p: dora(p, target=r"blocks\.1\..*"),
    "rsdora with dropout": rs_dora,
    "ia3": fgpt.ia3,
    "ia3 here and there": lambda p: fgpt.ia3(p, r"blocks\.0\.(attn\.o|mlp\.down)", r"blocks\.1\.(attn\.o|mlp\..*)"),
    "norms": lambda p: fgpt.trainable_leaves(p, r".*ln_.*"),
    "gains of some norms": lambda p: fgpt.trainable_leaves(p, r"blocks\.0\.ln_1\.w|blocks\.\d\.ln_2\..|ln_f\.b"),
}
ADAPTERS_OF_SOME_PROJECTIONS = {
    "rslora of q and v": lambda p: lora(p, rs=True, target=r".*\.(q|v)"),
    "dora of q and v": lambda p: dora(p, target=r".*\.(q|v)"),
    "dora of k, unequal": lambda p: dora(p, target=r".*\.0\..*k") | dora(p, rank=2, alpha=7, target=r".*\.0\..*v"),
    "ia3 of q": lambda p: fgpt.ia3(p, r"blocks\.1\.attn\.q", None),
}


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": True}


PEFT_IA3: dict[str, Any] = {"fan_in_fan_out": True}


PEFT_CONFIGS = {
    "dora": peft.LoraConfig(**LORA, use_dora=True, target_modules=["attn.c_attn", "mlp.c_fc"], lora_dropout=0.2),
    "dora of c_proj": peft.LoraConfig(**LORA, use_dora=True, use_rslora=True, target_modules=["c_proj"]),
    "rslora of c_fc": peft.LoraConfig(
        **LORA, use_rslora=True, target_modules=["c_fc"], rank_pattern={"h.0.mlp.c_fc": 2}
    ),
    "ia3": peft.IA3Config(**PEFT_IA3, target_modules=["attn.c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    "ia3 by pattern": peft.IA3Config(
        **PEFT_IA3, target_modules=r".*\.c_(attn|fc)", feedforward_modules=r".*1\.(attn|mlp)\..*"
    ),
    "norms": peft.LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"]),
    "a norm": peft.LNTuningConfig(target_modules=["h.1.ln_2"]),
}
