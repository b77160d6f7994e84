"""What PEFT trains beside low-rank matrices, read by us: embeddings, biases, norms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import close, tokens
from builders.peft_tuned import TUNED_BASES, config, family_of_base, save_base
from safetensors.torch import load_file

import fgpt
from fgpt.tree import leaves

X = tokens(31, 2, 9)
EMBEDDING = {"gpt2": "wte", "gptj": "wte", "neox": "embed_in", "llama": "embed_tokens"}
UP = {"gpt2": "mlp.c_fc", "gptj": "fc_in", "neox": "dense_h_to_4h", "llama": "up_proj"}
QKV = {"gpt2": "attn.c_attn", "gptj": "q_proj", "neox": "query_key_value", "llama": "q_proj"}
NORM = {"gpt2": "ln_1", "gptj": "ln_1", "neox": "input_layernorm", "llama": "input_layernorm"}
BELOW = tuple(f"{name}.base_layer.weight" for name in {*EMBEDDING.values(), "lm_head"})


def shake(model: Any, frozen: bool = False) -> Any:
    """What PEFT trains, moved away from where it begins; with `frozen` the table and the head below as well."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or (frozen and name.endswith(BELOW)):
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return model.eval()


KINDS: dict[str, Callable[[str], Any]] = {
    "head": lambda n: config(n, target_modules=["lm_head"]),
    "embedding": lambda n: config(n, target_modules=[EMBEDDING[n]]),
    "embedding and head": lambda n: config(n, target_modules=[EMBEDDING[n], "lm_head", UP[n]], lora_dropout=0.1),
    "rank-stabilised embedding": lambda n: config(n, target_modules=[EMBEDDING[n]], use_rslora=True),
    "dora of the head": lambda n: config(n, target_modules=["lm_head"], use_dora=True),
    "saved head": lambda n: config(n, target_modules=[UP[n]], modules_to_save=["lm_head"]),
    "saved embedding": lambda n: config(n, target_modules=[UP[n]], modules_to_save=[EMBEDDING[n]]),
    "saved both": lambda n: config(n, target_modules=[UP[n]], modules_to_save=[EMBEDDING[n], "lm_head"]),
    "saved embedding, head": lambda n: config(n, target_modules=["lm_head"], modules_to_save=[EMBEDDING[n]]),
    "saved norms": lambda n: config(n, target_modules=[UP[n]], modules_to_save=[NORM[n]]),
    "saved mlp": lambda n: config(n, target_modules=[QKV[n]], modules_to_save=["mlp"]),
    "all biases": lambda n: config(n, target_modules=[UP[n]], bias="all"),
    "biases below": lambda n: config(n, target_modules=[UP[n], QKV[n]], bias="lora_only"),
    "biases and norms": lambda n: config(n, target_modules=[QKV[n]], bias="all", modules_to_save=[NORM[n]]),
    "tied as PEFT ties": lambda n: config(
        n, target_modules=[UP[n]], modules_to_save=[EMBEDDING[n]], ensure_weight_tying=True
    ),
    "ia3 and a head": lambda n: peft.IA3Config(
        target_modules=[UP[n]], feedforward_modules=[], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "norms and a head": lambda n: peft.LNTuningConfig(
        target_modules=[NORM[n]], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
}


MOST = ("gpt2", "llama, tied")
"""The bases that all kinds are tried on."""
SOME = ("embedding and head", "saved both", "saved embedding, head", "saved norms", "all biases")


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in TUNED_BASES for k in KINDS if n in MOST or k in SOME])
def test_theirs_with_us(name: str, kind: str, tmp_path: Path):
    base = save_base(name, tmp_path / "base")
    model = shake(peft.get_peft_model(base, KINDS[kind](family_of_base(name))))
    model.save_pretrained(tmp_path / "adapter")
    params = fgpt.load(str(tmp_path / "base"))
    params = fgpt.fuse_qkv(params) if family_of_base(name) in ("gpt2", "neox") else params
    adapters = fgpt.load_peft(tmp_path / "adapter", params)
    with torch.no_grad():
        got = fgpt.apply(fgpt.adapt(params, adapters), X)
        close(got, model(X).logits, 1e-5)
        assert (got - fgpt.apply(params, X)).abs().max() > 1e-2
    reloaded = {**fgpt.load_peft(tmp_path / "adapter", params.untie())}
    close(fgpt.functional_call(fgpt.apply, (params.untie(), reloaded), X), got, 1e-6)
    if "saved both" not in kind and "PEFT ties" not in kind:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert fgpt.num_trainable(reloaded) == count


@pytest.mark.parametrize("kind", ["head", "embedding", "embedding and head"])
@pytest.mark.parametrize("name", TUNED_BASES)
def test_a_base_that_is_not_ours_is_kept(name: str, kind: str, tmp_path: Path):
    """PEFT writes the table and the head below an adapter; where they are not the base's, they count."""
    base = save_base(name, tmp_path / "base")
    model = shake(peft.get_peft_model(base, KINDS[kind](family_of_base(name))), frozen=True)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    params = fgpt.load(str(tmp_path / "base"))
    adapters = fgpt.load_peft(tmp_path / "adapter", params)
    with torch.no_grad():
        close(fgpt.apply(fgpt.adapt(params, adapters), X), model(X).logits, 1e-5)
    fresh = save_base(name, tmp_path / "base")
    fgpt.save_peft(adapters, params, tmp_path / "ours", "base")
    with torch.no_grad():
        close(peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()(X).logits, model(X).logits, 1e-5)


def test_an_embedding_of_no_adapter_is_the_base_s(tmp_path: Path):
    """What save_embedding_layers=True adds beside adapters elsewhere is no adapter."""
    base = save_base("llama", tmp_path / "base")
    model = shake(peft.get_peft_model(base, config("llama", target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert sum("lora" not in name for name in names) == 2
    params = fgpt.load(str(tmp_path / "base"))
    for dtype in (torch.float32, torch.bfloat16):
        subset = fgpt.load(str(tmp_path / "base"), dtype)
        assert {path.rpartition(".")[2] for path in fgpt.load_peft(tmp_path / "adapter", subset)} == {"q"}
    other = fgpt.adapt(params, {"head.w": leaves(params)["head.w"] + 1})
    assert "head.w" in fgpt.load_peft(tmp_path / "adapter", other)
