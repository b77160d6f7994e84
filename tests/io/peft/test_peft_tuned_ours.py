"""What we train beside low-rank matrices, in PEFT and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import close, tokens, with_noise
from builders.peft_adapters import assert_adapters_identical
from builders.peft_tuned import TUNED_BASES, config, family_of_base, save_base
from safetensors.torch import load_file

import fgpt
from fgpt.io.peft.adapter_files import pack
from fgpt.tree import leaves

X = tokens(31, 2, 9)
MOST = ("gpt2", "llama, tied")
"""The bases that all kinds are tried on."""


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
    base = save_base(name, at / "base")
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
    ("name", "kind"), [(n, k) for n in TUNED_BASES for k in OURS if n in MOST or k in ("embedding", "table", "matrix")]
)
def test_ours_in_peft_and_back(name: str, kind: str, tmp_path: Path):
    in_peft_and_back(name, OURS[kind], kind == "matrix" and family_of_base(name) == "neox", tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in ("gpt2", "gptj", "neox, tied") for k in BIASED if (n, k[-4:]) != ("gptj", "of q")],
)  # GPT-J's q, k, v and o have no biases
def test_biases_in_peft_and_back(name: str, kind: str, tmp_path: Path):
    assert in_peft_and_back(name, BIASED[kind], False, tmp_path)["bias"] == kind.partition(",")[0]


def test_a_tied_table_is_on_both_sides(tmp_path: Path):
    """Our LoRA on it moves the head too: PEFT has one on each, with the same matrices."""
    files = in_peft_and_back("gpt2", lambda p: lora(p, "wte"), False, tmp_path)
    assert files["target_modules"] == ["lm_head", "wte"]
    files = in_peft_and_back("gpt2", lambda p: lora(p) | fgpt.trainable_leaves(p, "wte.w"), False, tmp_path)
    assert files["modules_to_save"] == ["transformer.wte", "lm_head"]


def test_a_head_that_is_adapted_comes_apart(tmp_path: Path):
    params = fgpt.load(str(save_base("gpt2", tmp_path / "base").config._name_or_path))
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
    params = fgpt.load(str(save_base("gpt2", tmp_path / "base").config._name_or_path))
    make, expected = REFUSED[kind]
    with pytest.raises(fgpt.InputError, match=expected) as caught:
        pack(make(params), params, "base")
    assert "save_adapters(adapters, path) keeps it" in str(caught.value)


def changed_file(tmp_path: Path, **tensors: torch.Tensor) -> fgpt.GPT:
    """A LoRA of a llama as PEFT has written it, with more tensors in it."""
    base = save_base("llama", tmp_path / "base")
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
            r"a classifier of 3 classes: load_peft\(folder, with_classification_head\(params, 3, key\)",
        ),
    ],
)
def test_tensors_that_fit_nowhere(name: str, x: torch.Tensor, expected: str, tmp_path: Path):
    params = changed_file(tmp_path, **{name: x})
    with pytest.raises(fgpt.InputError, match=expected) as caught:
        fgpt.load_peft(tmp_path / "adapter", params)
    assert "\n" not in str(caught.value)


def test_an_adapter_s_config_names_no_place(tmp_path: Path):
    params = fgpt.load(str(save_base("gpt2", tmp_path / "secret" / "base").config._name_or_path))
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
