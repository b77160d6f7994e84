"""What PEFT trains beside low-rank matrices, both ways: embeddings, heads, whole modules and biases, as PEFT saves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import close, hf_gpt2, tokens, with_noise
from builders.hf_models import hf_model
from builders.peft_adapters import assert_adapters_identical
from safetensors.torch import load_file

import fgpt
from fgpt.io.peft.adapter_files import pack
from fgpt.tree import leaves

X = tokens(31, 2, 9)
BASES: dict[str, Callable[[], Any]] = {
    "gpt2": hf_gpt2,
    "gpt2, apart": lambda: hf_gpt2(tie_word_embeddings=False),
    "gptj": lambda: hf_model("gptj"),
    "neox, tied": lambda: hf_model("neox, tied"),
    "llama": lambda: hf_model("llama"),
    "llama, tied": lambda: hf_model("llama, tied"),
}
EMBEDDING = {"gpt2": "wte", "gptj": "wte", "neox": "embed_in", "llama": "embed_tokens"}
UP = {"gpt2": "mlp.c_fc", "gptj": "fc_in", "neox": "dense_h_to_4h", "llama": "up_proj"}
QKV = {"gpt2": "attn.c_attn", "gptj": "q_proj", "neox": "query_key_value", "llama": "q_proj"}
NORM = {"gpt2": "ln_1", "gptj": "ln_1", "neox": "input_layernorm", "llama": "input_layernorm"}
BELOW = tuple(f"{name}.base_layer.weight" for name in {*EMBEDDING.values(), "lm_head"})


def family(name: str) -> str:
    return name.partition(",")[0]


def saved_base(name: str, at: Path) -> Any:
    """The model from its own folder, which PEFT then knows as its base."""
    model = BASES[name]()
    model.save_pretrained(at)
    model.config._name_or_path = model.name_or_path = str(at)
    return model


def shake(model: Any, frozen: bool = False) -> Any:
    """What PEFT trains, moved away from where it begins; with `frozen` the table and the head below as well."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or (frozen and name.endswith(BELOW)):
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return model.eval()


def config(name: str, **options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"} | options)


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


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in BASES for k in KINDS if n in MOST or k in SOME])
def test_theirs_with_us(name: str, kind: str, tmp_path: Path):
    base = saved_base(name, tmp_path / "base")
    model = shake(peft.get_peft_model(base, KINDS[kind](family(name))))
    model.save_pretrained(tmp_path / "adapter")
    params = fgpt.load(str(tmp_path / "base"))
    params = fgpt.fuse_qkv(params) if family(name) in ("gpt2", "neox") else params
    adapters = fgpt.load_peft(tmp_path / "adapter", params)
    with torch.no_grad():
        got = fgpt.apply(fgpt.adapt(params, adapters), X)
        close(got, model(X).logits, 1e-5)
        assert (got - fgpt.apply(params, X)).abs().max() > 1e-2
    again = {**fgpt.load_peft(tmp_path / "adapter", params.untie())}
    close(fgpt.functional_call(fgpt.apply, (params.untie(), again), X), got, 1e-6)
    if "saved both" not in kind and "PEFT ties" not in kind:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert fgpt.num_trainable(again) == count


@pytest.mark.parametrize("kind", ["head", "embedding", "embedding and head"])
@pytest.mark.parametrize("name", BASES)
def test_a_base_that_is_not_ours_is_kept(name: str, kind: str, tmp_path: Path):
    """PEFT writes the table and the head below an adapter; where they are not the base's, they count."""
    base = saved_base(name, tmp_path / "base")
    model = shake(peft.get_peft_model(base, KINDS[kind](family(name))), frozen=True)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    params = fgpt.load(str(tmp_path / "base"))
    adapters = fgpt.load_peft(tmp_path / "adapter", params)
    with torch.no_grad():
        close(fgpt.apply(fgpt.adapt(params, adapters), X), model(X).logits, 1e-5)
    fresh = saved_base(name, tmp_path / "base")
    fgpt.save_peft(adapters, params, tmp_path / "ours", "base")
    with torch.no_grad():
        close(peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()(X).logits, model(X).logits, 1e-5)


def test_an_embedding_of_no_adapter_is_the_base_s(tmp_path: Path):
    """What save_embedding_layers=True adds beside adapters elsewhere is no adapter."""
    base = saved_base("llama", tmp_path / "base")
    model = shake(peft.get_peft_model(base, config("llama", target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert sum("lora" not in name for name in names) == 2
    params = fgpt.load(str(tmp_path / "base"))
    for dtype in (torch.float32, torch.bfloat16):
        some = fgpt.load(str(tmp_path / "base"), dtype)
        assert {path.rpartition(".")[2] for path in fgpt.load_peft(tmp_path / "adapter", some)} == {"q"}
    other = fgpt.adapt(params, {"head.w": leaves(params)["head.w"] + 1})
    assert "head.w" in fgpt.load_peft(tmp_path / "adapter", other)


# --------------------------------------------------------------------------------------------------------------- ours


def lora(p: fgpt.GPT, target: str = r".*\.(up|o)", **options: Any) -> fgpt.Adapters:
    return fgpt.lora(p, fgpt.key(0), **{"rank": 3, "alpha": 5, "target": target} | options)


OURS: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "norms": lambda p: lora(p) | fgpt.trainable_leaves(p, r".*ln_.*"),
    "gains": lambda p: lora(p) | fgpt.trainable_leaves(p, r".*ln_.\.w"),
    "embedding": lambda p: lora(p, r"wte|.*\.up"),
    "embedding, ranks": lambda p: lora(p, "wte", rank=2, alpha=10 / 3) | lora(p),
    "table": lambda p: lora(p) | fgpt.trainable_leaves(p, "wte.*"),
    "matrix": lambda p: lora(p) | fgpt.trainable_leaves(p, r"blocks\.1\.attn\.(q|k|v|qkv)\..*"),
    "weights": lambda p: lora(p) | fgpt.trainable_leaves(p, r"blocks\.1\.mlp\.down\.w"),
    "dora": lambda p: fgpt.dora(p, fgpt.key(0), 3, target=r".*\.up") | fgpt.trainable_leaves(p, r".*ln_.*|wte.*"),
    "below": lambda p: lora(p) | fgpt.trainable_leaves(p, r"blocks\.0\.mlp\.up\.w"),
    "ia3": lambda p: fgpt.ia3(p, r".*\.o", None) | fgpt.trainable_leaves(p, r".*ln_.*|.*\.down.*"),
    "norms and matrices": lambda p: fgpt.trainable_leaves(p, r".*ln_.*|.*\.down.*|wte.*"),
}
BIASED: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "all": lambda p: lora(p) | fgpt.trainable_leaves(p, r".*\.b"),
    "all, of all": lambda p: lora(p, r"blocks\..*|wte") | fgpt.trainable_leaves(p, r".*\.b|wte.*|.*ln_.*"),
    "lora_only": lambda p: lora(p) | fgpt.trainable_leaves(p, r".*\.(up|o)\.b"),
    "lora_only, of q": lambda p: lora(p, r".*\.(q|o)") | fgpt.trainable_leaves(p, r".*\.(q|k|v|o)\.b"),
}


def in_peft_and_back(name: str, make: Callable[[fgpt.GPT], fgpt.Adapters], fused: bool, at: Path) -> dict[str, Any]:
    """The config that was written."""
    base = saved_base(name, at / "base")
    params = fgpt.load(str(at / "base"))
    params = fgpt.fuse_qkv(params) if fused else params
    adapters = with_noise(make(params), 0.1)
    fgpt.save_peft(adapters, params, at / "adapter", "base")
    model = peft.PeftModel.from_pretrained(base, at / "adapter").eval()
    with torch.no_grad():
        got = fgpt.apply(fgpt.adapt(params, adapters), X)
        close(got, model(X).logits, 1e-5)
        assert (got - fgpt.apply(params, X)).abs().max() > 1e-2
    assert_adapters_identical(fgpt.load_peft(at / "adapter", params), adapters)
    return json.loads((at / "adapter" / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in BASES for k in OURS if n in MOST or k in ("embedding", "table", "matrix")]
)
def test_ours_in_peft_and_back(name: str, kind: str, tmp_path: Path):
    in_peft_and_back(name, OURS[kind], kind == "matrix" and family(name) == "neox", tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in ("gpt2", "gptj", "neox, tied") for k in BIASED if (n, k[-4:]) != ("gptj", "of q")],
)  # GPT-J's q, k, v and o have no biases
def test_biases_in_peft_and_back(name: str, kind: str, tmp_path: Path):
    assert in_peft_and_back(name, BIASED[kind], False, tmp_path)["bias"] == kind.partition(",")[0]


def test_a_tied_table_is_on_both_sides(tmp_path: Path):
    """Our LoRA on it moves the head too: PEFT has one on each, with the same matrices."""
    written = in_peft_and_back("gpt2", lambda p: lora(p, "wte"), False, tmp_path)
    assert written["target_modules"] == ["lm_head", "wte"]
    written = in_peft_and_back("gpt2", lambda p: lora(p) | fgpt.trainable_leaves(p, "wte.w"), False, tmp_path)
    assert written["modules_to_save"] == ["transformer.wte", "lm_head"]


def test_a_head_that_is_adapted_comes_apart(tmp_path: Path):
    params = fgpt.load(str(saved_base("gpt2", tmp_path / "base").config._name_or_path))
    head = with_noise(fgpt.lora(params.untie(), fgpt.key(0), 2, target="head"))
    tuned = fgpt.adapt(params, head)
    assert tuned.head is not None
    assert not tuned.cfg.tie_word_embeddings
    assert tuned.wte is params.wte
    moved = fgpt.adapt(params, {"wte.w": leaves(params)["wte.w"] + 1}, head)  # one tree after the other
    together = fgpt.adapt(params, head | {"wte.w": leaves(params)["wte.w"] + 1})
    close(fgpt.apply(moved, X), fgpt.apply(together, X), 0)
    assert fgpt.merge(tuned).cfg == tuned.cfg
    fgpt.save(fgpt.merge(tuned), tmp_path / "merged")
    close(fgpt.apply(fgpt.load(str(tmp_path / "merged")), X), fgpt.apply(tuned, X), 1e-5)


REFUSED: dict[str, tuple[Callable[[fgpt.GPT], fgpt.Adapters], str]] = {
    "some biases": (
        lambda p: lora(p) | fgpt.trainable_leaves(p, r"blocks\.0\.mlp\.down\.b"),
        "a part of transformer.h.0.mlp.c_proj",
    ),
    "a bias below": (lambda p: lora(p) | fgpt.trainable_leaves(p, r"blocks\.0\.mlp\.up\.b"), "a bias below an adapter"),
    "a third": (
        lambda p: lora(p) | fgpt.trainable_leaves(p, r".*\.0\.attn\.q\.w"),
        "blocks.0.attn.q.w alone, a part of",
    ),
    "dora of the table": (lambda p: fgpt.dora(p, fgpt.key(0), 3, target="wte"), "no place for DoRA on wte"),
    "a matrix alone": (lambda p: fgpt.trainable_leaves(p, r".*\.down.*"), "without an adapter or a norm beside it"),
    "ia3 and biases": (lambda p: fgpt.ia3(p) | fgpt.trainable_leaves(p, r".*\.b"), "alone, a "),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_peft_has_no_place_for_says_why(kind: str, tmp_path: Path):
    params = fgpt.load(str(saved_base("gpt2", tmp_path / "base").config._name_or_path))
    make, expected = REFUSED[kind]
    with pytest.raises(fgpt.InputError, match=expected) as caught:
        pack(make(params), params, "base")
    assert "save_adapters(adapters, path) keeps it" in str(caught.value)


def changed_file(tmp_path: Path, **tensors: torch.Tensor) -> fgpt.GPT:
    """A LoRA of a llama as PEFT has written it, with more tensors in it."""
    base = saved_base("llama", tmp_path / "base")
    peft.get_peft_model(base, config("llama", target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    from safetensors.torch import save_file

    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.{n}": x for n, x in tensors.items()}, path, {"format": "pt"})
    return fgpt.load(str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        (
            "lm_head.base_layer.weight",
            torch.ones(40, 32),
            r"expected shape \[31, 32\], got \[40, 32\], as of another voc",
        ),
        ("model.layers.0.mlp.bias", torch.ones(4), "is none of peft_type 'LORA'"),
        ("model.layers.0.mlp.up_proj.bias", torch.ones(4), r"has no place in this model, whose \S+up_proj has no bias"),
        (
            "score.weight",
            torch.ones(3, 32),
            r"a classifier of 3 classes: load_peft\(folder, classifier\(params, 3, key\)",
        ),
    ],
)
def test_tensors_that_fit_nowhere(name: str, x: torch.Tensor, expected: str, tmp_path: Path):
    params = changed_file(tmp_path, **{name: x})
    with pytest.raises(fgpt.InputError, match=expected) as caught:
        fgpt.load_peft(tmp_path / "adapter", params)
    assert "\n" not in str(caught.value)


def test_an_adapter_s_config_names_no_place(tmp_path: Path):
    params = fgpt.load(str(saved_base("gpt2", tmp_path / "secret" / "base").config._name_or_path))
    adapters = lora(params)
    names = {
        str(tmp_path / "secret" / "base"): ("base", None),
        f"{tmp_path}/secret/base/": ("base", None),
        "~/models/mine": ("mine", None),
        "../mine": ("mine", None),
        r"C:\Users\me\mine": ("mine", None),
        "gpt2": ("gpt2", None),
        "owner/model@v2": ("owner/model", "v2"),
    }
    for base, (name, revision) in names.items():
        fgpt.save_peft(adapters, params, tmp_path / "adapter", base)
        text = (tmp_path / "adapter" / "adapter_config.json").read_text()
        found: Any = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
        assert (found.base_model_name_or_path, found.revision) == (name, revision)
        assert "secret" not in text
        assert str(Path.home()) not in text
