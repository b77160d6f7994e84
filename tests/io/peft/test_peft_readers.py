"""What readers of a LoRA that know less than PEFT make of our files: the same product for every module.

llama.cpp takes lora_alpha over the rows of A for a module's scale, others lora_alpha over r, and neither knows
rank_pattern, alpha_pattern or rank-stabilised LoRA.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import close, hf_gpt2, load_hf_model, with_noise
from builders.hf_models import hf_model, save_and_load
from builders.peft_adapters import TOKENS, assert_adapters_identical, assert_logits_agree
from safetensors.torch import load_file, save_file
from torch import Tensor

import fgpt
from fgpt.families import family_of
from fgpt.families.mapping import join_heads
from fgpt.layers import weight_matrices
from fgpt.weights import dense

RULES: dict[str, Callable[[dict[str, Any], Tensor], float]] = {
    "alpha / r": lambda config, a: config["lora_alpha"] / config["r"],
    "alpha / rows of A": lambda config, a: config["lora_alpha"] / len(a),
}


def products(folder: Path, rule: str) -> dict[str, Tensor]:
    """ΔW = s B A by the module's name, with s from adapter_config.json alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", name):
            b = tensors[name.replace("lora_A", "lora_B")]
            found[match[1]] = RULES[rule](config, a) * b.double() @ a.double()
    return found


def expected_products(params: fgpt.GPT, adapters: fgpt.Adapters) -> dict[str, Tensor]:
    """ΔW of each of the hub's modules, [out, in]: what our own adapters add to its weight."""
    base, tuned = (
        {path: dense(w).double() for path, w in weight_matrices(p).items()}
        for p in (params, fgpt.adapt(params, adapters))
    )
    family, found = family_of(params.cfg), {}
    for s in family.tensor_mappings(params.cfg):
        layer = [path.removesuffix(".w") for path in s.paths]
        if any(path in adapters for path in layer):
            changed = join_heads([tuned[path] - base[path] for path in layer], s)
            found[family.prefix + s.name.removesuffix(".weight")] = changed.T if s.transposed else changed
    return found


def lora(target: str, rank: int = 4, alpha: float = 8, rs: bool = False) -> Callable[[fgpt.GPT], fgpt.Adapters]:
    return lambda p: fgpt.lora(p, fgpt.key(0), rank, alpha, target, rs)


KINDS: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "q and v": lora(r".*\.(q|v)"),
    "q, k, v and o": lora(r".*\.(q|k|v|o)"),
    "all six": lora(r"blocks\..*"),
    "q of one block": lora(r"blocks\.0\..*\.q"),
    "ranks": lambda p: lora(r".*\.(q|k|v)", 3, 6)(p) | lora(r".*\.o", 5, 10)(p) | lora(r".*\.up", 2, 4)(p),
    "alphas": lambda p: lora(r".*\.q", 4, 8)(p) | lora(r".*\.v", 4, 3)(p) | lora(r".*\.(o|down)", 4, 20)(p),
    "both": lambda p: lora(r".*\.q", 2, 8)(p) | lora(r".*\.v", 3, 1)(p) | lora(r".*\.1\.mlp\..*", 7, 5)(p),
    "rank-stabilised": lora(r".*\.(q|k|v|o)", 4, 3, True),
    "some rank-stabilised": lambda p: lora(r".*\.(q|v)", 4, 3, True)(p) | lora(r".*\.up", 4, 3)(p),
    "of no strength": lambda p: lora(r".*\.q", 4, 0)(p) | lora(r".*\.up", 4, 3)(p),
    "negative": lora(r".*\.(q|up)", 4, -3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_every_reader_has_our_products(name: str, kind: str, tmp_path: Path):
    model: Any = hf_gpt2() if name == "gpt2" else hf_model(name)
    params = load_hf_model(model, tmp_path / "base") if name == "gpt2" else save_and_load(model)
    adapters = with_noise(KINDS[kind](params), 0.1)
    fgpt.save_peft(adapters, params, tmp_path / "adapter", "base")
    target = expected_products(params, adapters)
    for rule in RULES:
        got = products(tmp_path / "adapter", rule)
        assert got.keys() == target.keys()
        for module, x in got.items():
            torch.testing.assert_close(x, target[module], atol=1e-6, rtol=0)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert not any(config.get(x) for x in ("rank_pattern", "alpha_pattern", "use_rslora"))
    with torch.no_grad():
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        close(fgpt.functional_call(fgpt.apply, (params, adapters), TOKENS), wrapped(TOKENS).logits, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_back_trains_as_what_was_saved(kind: str, tmp_path: Path):
    """Ranks, alphas and kinds are those that were saved; to the bit, where all had one scale."""
    params = load_hf_model(hf_gpt2(), tmp_path / "base")
    adapters: Any = with_noise(KINDS[kind](params), 0.1)
    fgpt.save_peft(adapters, params, tmp_path, "base")
    reloaded: Any = fgpt.load_peft(tmp_path, params)
    scales = {x.scale for x in adapters.values()}
    if len(scales) == 1:
        assert_adapters_identical(reloaded, adapters)
        return
    assert reloaded.keys() == adapters.keys()
    for path, x in adapters.items():
        y = reloaded[path]
        assert torch.equal(y.a, x.a)
        assert (y.alpha, y.rs, y.dropout) == (x.alpha, x.rs, x.dropout)
        torch.testing.assert_close(y.b if x.alpha else 0 * y.b, x.b if x.alpha else 0 * x.b, atol=1e-7, rtol=1e-6)


def test_a_fused_base_reads_what_was_stacked_and_padded(tmp_path: Path):
    params = load_hf_model(hf_gpt2(), tmp_path / "base")
    adapters = with_noise(KINDS["ranks"](params), 0.1)
    fgpt.save_peft(adapters, params, tmp_path / "adapter", "base")
    whole = fgpt.fuse_qkv(params)
    reloaded: Any = fgpt.load_peft(tmp_path / "adapter", whole)
    assert {path: len(x.a) for path, x in reloaded.items() if ".0." in path} == {
        "blocks.0.attn.qkv": 9, "blocks.0.attn.o": 5, "blocks.0.mlp.up": 2,
    }  # fmt: skip
    assert_logits_agree(whole, reloaded, peft.PeftModel.from_pretrained(hf_gpt2(), tmp_path / "adapter").eval())


def test_a_file_of_the_version_before_is_read(tmp_path: Path):
    """With rank_pattern, alpha_pattern and use_rslora, and no word of rank-stabilised LoRA in what was stacked."""
    params = load_hf_model(hf_gpt2(), tmp_path / "base")
    a, b = torch.randn(6, 16), torch.zeros(48, 6)
    b[:16, :2], b[32:, 2:] = torch.randn(16, 2), torch.randn(16, 4)
    module = "base_model.model.transformer.h.0.attn.c_attn"
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    stacked = {"transformer.h.0.attn.c_attn": {"q": [2, 4 * 2**0.5], "v": [4, 8.0]}}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt", "fgpt_held": json.dumps(stacked)})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 1.0, "use_rslora": True}
    config |= {"target_modules": ["transformer.h.0.attn.c_attn"], "fan_in_fan_out": True}
    config |= {"rank_pattern": {r"transformer\.h\.0\.attn\.c_attn": 6}}
    config |= {"alpha_pattern": {r"transformer\.h\.0\.attn\.c_attn": 4 * 6**0.5}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapters: Any = fgpt.load_peft(tmp_path, params)
    assert {path: (len(x.a), x.rs) for path, x in adapters.items()} == {
        "blocks.0.attn.q": (2, True), "blocks.0.attn.v": (4, True),
    }  # fmt: skip
    assert_logits_agree(params, adapters, peft.PeftModel.from_pretrained(hf_gpt2(), tmp_path).eval())


def test_what_padding_costs(tmp_path: Path):
    """r 8 on q, k, v and o apart: 24 rows for c_attn, which o has too; of zeros, two thirds of o's."""
    params = load_hf_model(hf_gpt2(n_embd=32), tmp_path / "base")
    adapters = fgpt.lora(params, fgpt.key(0), 8, 16, r".*\.(q|k|v|o)")
    fgpt.save_peft(adapters, params, tmp_path, "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    sizes = {name.split(".")[-3]: 0 for name in tensors}
    for name, x in tensors.items():
        sizes[name.split(".")[-3]] += x.numel() // 2  # a block
    assert sizes == {"c_attn": 24 * (32 + 96), "c_proj": 24 * (32 + 32)}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (24, 48)
