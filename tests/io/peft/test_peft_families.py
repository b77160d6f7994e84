"""PEFT's files of every family: theirs with us, ours in PEFT and back, and what has no place in them."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import close, hf_gpt2, tiny, tokens, with_noise
from builders.hf_models import VARIANTS, hf_model, save_and_load
from builders.peft_adapters import ADAPTERS_OF_SOME_PROJECTIONS, OUR_ADAPTERS, assert_adapters_identical
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

import fgpt
from fgpt import families
from fgpt.cli import run_dir
from fgpt.io.peft import modules as peft_modules
from fgpt.io.peft.adapter_files import pack
from fgpt.tree import leaves

X = tokens(31, 2, 9)
TRAINED = "lora_|ia3_|ln_tuning"
"""What PEFT has trained, among the names of its model's parameters."""


def modules(model: Any, pattern: str = ".*") -> list[str]:
    """The linear layers of theirs whose names match, but for a head that is the embedding table."""
    found = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(pattern, n)]
    return [n for n in found if n != "lm_head" or not model.config.tie_word_embeddings]


def norms(model: Any) -> list[str]:
    return [n for n, m in model.named_modules() if "Norm" in type(m).__name__]


def trained(model: Any, config: Any) -> Any:
    """`model` under PEFT's adapters of `config`, each moved away from the identity."""
    wrapped = peft.get_peft_model(model, config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if re.search(TRAINED, name):
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return wrapped.eval()


def kept(model: Any, at: Path) -> Path:
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
    "lora": lambda m: peft.LoraConfig(**LORA, target_modules=modules(m)),
    "rslora, here and there": lambda m: peft.LoraConfig(
        **LORA,
        target_modules=modules(m, r".*\.1\..*|lm_head"),
        use_rslora=True,
        rank_pattern={re.escape(n): 2 for n in modules(m, r".*\.1\.mlp.*")},
        alpha_pattern={re.escape(n): 5 for n in modules(m, r".*\.1\.mlp\.(fc_in|dense_h_to_4h|up_proj)")},
    ),
    "dora": lambda m: peft.LoraConfig(**LORA, target_modules=modules(m), use_dora=True, lora_dropout=0.2),
    "ia3": lambda m: peft.IA3Config(target_modules=modules(m), feedforward_modules=modules(m, DOWN)),
    "norms": lambda m: peft.LNTuningConfig(target_modules=norms(m)),
    "a norm": lambda m: peft.LNTuningConfig(target_modules=norms(m)[1:2]),
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("name", VARIANTS)
def test_theirs_with_us(name: str, kind: str, tmp_path: Path):
    plain = hf_model(name)
    params = save_and_load(plain)
    model = trained(plain, THEIRS[kind](plain))
    at = kept(model, tmp_path)
    in_one = name.startswith("neox") and "ora" in kind
    base = fgpt.fuse_qkv(params) if in_one else params
    adapters = fgpt.load_peft(at, base)
    agrees(base, adapters, model)
    if in_one:
        with pytest.raises(fgpt.InputError, match=r"fuse\(params\) first"):
            fgpt.load_peft(at, params)
    elif not name.startswith("neox"):
        count = sum(p.numel() for n, p in model.named_parameters() if re.search(TRAINED, n))
        assert fgpt.num_trainable(adapters) == count


@pytest.mark.parametrize("name", ["gptj", "neox", "llama"])
def test_a_model_without_its_head(name: str, tmp_path: Path):
    """What PEFT trained on AutoModel has names without the family's prefix."""
    params, bare = save_and_load(hf_model(name)), hf_model(name).base_model
    params = fgpt.fuse_qkv(params) if name == "neox" else params
    model = trained(bare, peft.LoraConfig(**LORA, target_modules=modules(bare)))
    names = load_file(kept(model, tmp_path) / "adapter_model.safetensors")
    assert all(n.startswith(("base_model.model.h.", "base_model.model.layers.")) for n in names)
    adapters = fgpt.load_peft(tmp_path, params)
    with torch.no_grad():
        close(fgpt.hidden(fgpt.adapt(params, adapters), X), model(X).last_hidden_state, 1e-5)


def test_the_head_of_a_neox_under_its_old_name(tmp_path: Path):
    """transformers before 5.14 has it as embed_out."""
    model = trained(hf_model("neox"), peft.LoraConfig(**LORA, target_modules=["lm_head"]))
    file = kept(model, tmp_path) / "adapter_model.safetensors"
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
    again = fgpt.load_peft(at, params)
    agrees(params, again, model)
    return again


@pytest.mark.parametrize("kind", OUR_ADAPTERS | ADAPTERS_OF_SOME_PROJECTIONS)
@pytest.mark.parametrize("name", ["gptj", "neox", "llama, one kv head", "llama, biases", "qwen2", "qwen3"])
def test_ours_in_peft_and_back(name: str, kind: str, tmp_path: Path):
    params = save_and_load(hf_model(name))
    adapters = with_noise((OUR_ADAPTERS | ADAPTERS_OF_SOME_PROJECTIONS)[kind](params), 0.1)
    again: Any = in_peft_and_back(name, params, adapters, tmp_path)
    if "unequal" in kind:  # B takes up the quotient of the scales, but for rounding
        close(again, adapters, 1e-7)
    else:
        assert_adapters_identical(again, adapters)


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
    assert bool(packed.held) == (name == "neox" and "q" in target)


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
    held = {m.name: m for m in peft_modules.modules_of(params.cfg)}
    embeddings = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    assert held.keys() == {*modules(model), *norms(model), *embeddings, "lm_head"}
    assert {n for n, m in held.items() if m.norm} == set(norms(model))
    assert {n for n, m in held.items() if m.embedding} == embeddings
    parts = {path for m in held.values() for path in m.parts}
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
        with pytest.raises(fgpt.InputError, match=r"do not fuse\(params\)"):
            fgpt.load_peft(tmp_path / "adapter", whole)


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
    made: dict[str, fgpt.GPT] = {name: save_and_load(hf_model(name)) for name in ("gptj", "neox", "llama")} | {
        "gpt2": tiny()
    }
    for name, params in made.items():
        at = tmp_path / name
        fgpt.save_peft(fgpt.lora(params, fgpt.key(0), 3), params, at, "base")
        for other in made.values():
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
