"""The names that an adapter's config gives select just its modules."""

from pathlib import Path

import peft
import pytest
import torch
from builders import hf_gpt2, tiny
from builders.hf_models import VARIANTS, hf_model, save_and_load
from builders.peft_families import linear_modules, norm_modules
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

import fgpt
from fgpt import families
from fgpt.io.peft import modules as peft_modules
from fgpt.io.peft.adapter_files import pack
from fgpt.tree import leaves

# --------------------------------------------------------------------------------------------------------------- ours


TARGETS = {
    ("gptj", r".*\.(q|v|up)"): ["attn.q_proj", "attn.v_proj", "mlp.fc_in"],
    ("neox", r".*\.(q|v|up)"): ["attention.query_key_value", "mlp.dense_h_to_4h"],
    ("neox", r".*\.1\..*\.o|head"): ["gpt_neox.layers.1.attention.dense", "lm_head"],
    ("llama", r".*\.(q|v|gate)"): ["mlp.gate_proj", "self_attn.q_proj", "self_attn.v_proj"],
    ("qwen2", r".*\.0\.mlp\.up|.*\.k"): ["model.layers.0.mlp.up_proj", "self_attn.k_proj"],
}


@pytest.mark.parametrize(("name", "target"), TARGETS)
def test_names_that_select_just_the_modules(name: str, target: str):
    params = save_and_load(hf_model(name))
    packed = pack(fgpt.lora(params, fgpt.key(0), 3, target=target), params, "base")
    assert packed.config["target_modules"] == TARGETS[name, target]
    assert packed.config["fan_in_fan_out"] is False
    assert bool(packed.parts) == (name == "neox" and "q" in target)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "neox", "qwen3"])
def test_names_of_any_modules_select_just_them(name: str):
    """By PEFT's own selection among all modules of 12 blocks, and by another that IA3 has for feedforward modules."""
    more = {"gpt2": "n_layer", "gptj": "n_layer"}.get(name, "num_hidden_layers")
    model = hf_gpt2(n_layer=12, tie_word_embeddings=False) if name == "gpt2" else hf_model(name, **{more: 12})
    config = model.config.to_dict()
    known = peft_modules.modules_of(families.family_from_config(config).config_from_hf(config))
    everything = [n for n, _ in model.named_modules()]
    layers = sorted({m.path.rpartition(".")[2] for m in known})

    @given(st.sets(st.sampled_from(layers)), st.sets(st.sampled_from(known), max_size=3))
    def check(whole: set[str], odd: set[peft_modules.Module]):
        chosen = {m for m in known if m.path.rpartition(".")[2] in whole} ^ odd
        config = peft.IA3Config(target_modules=peft_modules.targets(chosen, known), feedforward_modules=[])
        assert {n for n in everything if check_target_module_exists(config, n)} == {m.name for m in chosen}
        linear = [m for m in known if not m.norm]
        config.feedforward_modules = peft_modules.targets(chosen.intersection(linear), known)
        assert {m for m in linear if peft.IA3Model._check_target_module_feedforward(config, m.name)} == {
            m for m in linear if m in chosen
        }

    check()


def test_transposed_modules_say_so():
    params = tiny(tie_word_embeddings=False)
    for target, transposed in ((r"blocks\..*", True), ("head", False), (r"head|.*\.up", True)):
        packed = pack(fgpt.lora(params, fgpt.key(0), 3, target=target), params, "base")
        assert packed.config["fan_in_fan_out"] is transposed


@pytest.mark.parametrize("name", VARIANTS)
def test_a_module_for_each_layer_and_norm(name: str):
    """By name, they are transformers' own, and hold all of the model."""
    model = hf_model(name)
    params = save_and_load(model)
    modules = {m.name: m for m in peft_modules.modules_of(params.cfg)}
    embeddings = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    assert modules.keys() == {*linear_modules(model), *norm_modules(model), *embeddings, "lm_head"}
    assert {n for n, m in modules.items() if m.norm} == set(norm_modules(model))
    assert {n for n, m in modules.items() if m.embedding} == embeddings
    parts = {path for m in modules.values() for path in m.parts}
    assert parts == {p.rpartition(".")[0] for p in leaves(params)} | {"head"}


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", ["gptj", "llama", "qwen3"])
def test_q_k_and_v_fused_of_a_family_that_has_them_apart(name: str, tmp_path: Path):
    params = save_and_load(hf_model(name))
    whole = fgpt.fuse_qkv(params)
    for adapters in (fgpt.lora(whole, fgpt.key(0)), fgpt.ia3(whole)):
        with pytest.raises(fgpt.InputError, match=r"qkv, as q, k and v are modules of their own: save_adapters"):
            fgpt.save_peft(adapters, whole, tmp_path / "adapter", "base")
        assert not (tmp_path / "adapter").exists()
    for adapters in (fgpt.lora(params, fgpt.key(0)), fgpt.ia3(params)):
        fgpt.save_peft(adapters, params, tmp_path / "adapter", "base")
        with pytest.raises(fgpt.InputError, match=r"do not fuse_qkv\(params\)"):
            fgpt.load_peft(tmp_path / "adapter", whole)
