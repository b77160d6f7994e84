"""Trainable tokens in PEFT's files: theirs with us, ours in PEFT and back."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import close, tokens, with_noise
from builders.peft_adapters import assert_adapters_identical
from builders.peft_families import linear_modules
from builders.peft_tuned import TUNED_BASES, family_of_base, save_base
from safetensors.torch import load_file, save_file

import fgpt
from fgpt.errors import InputError

X = tokens(31, 2, 9)
BASES = [name for name in TUNED_BASES if name != "gptj"]
"""PEFT drops the bias of GPT-J's head where tokens of the head are trained."""
IDS = [30, 4, 7]
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens", "neox": "embed_in"}
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5}


def embedding_of(name: str) -> str:
    return EMBEDDING[family_of_base(name)]


def head_of(model: Any) -> str:
    return next(n for n, m in model.named_modules() if m is model.get_output_embeddings())


def lora_config(model: Any, **options: Any) -> Any:
    modules = ["c_fc"] if hasattr(model, "transformer") else linear_modules(model, r".*\.1\.mlp.*")
    return peft.LoraConfig(**LORA, target_modules=modules, **options)


THEIRS = {
    "alone": lambda name, m: peft.TrainableTokensConfig(token_indices=IDS),
    "beside LoRA": lambda name, m: lora_config(m, trainable_token_indices=IDS),
    "of both": lambda name, m: lora_config(m, trainable_token_indices={embedding_of(name): IDS, head_of(m): IDS}),
    "of both, others": lambda name, m: lora_config(
        m, trainable_token_indices={embedding_of(name): IDS, head_of(m): [1]}
    ),
    "of the head": lambda name, m: lora_config(m, trainable_token_indices={head_of(m): IDS}),
}


def trained(model: Any, config: Any) -> Any:
    """`model` under PEFT's adapters of `config`, each moved away from the identity."""
    wrapped = peft.get_peft_model(model, config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if re.search("lora_|trainable_tokens_delta", name):
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return wrapped.eval()


def agrees(params: fgpt.GPT, adapters: fgpt.Adapters, model: Any) -> None:
    with torch.no_grad():
        got = fgpt.apply(fgpt.adapt(params, adapters), X)
        close(got, model(X).logits, 1e-5)
        assert (got - fgpt.apply(params, X)).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("with_tables", [False, True])
def test_theirs_here(name: str, kind: str, with_tables: bool, tmp_path: Path):
    model = save_base(name, tmp_path / "base")
    params = fgpt.load(str(tmp_path / "base"))
    theirs = trained(model, THEIRS[kind](name, model))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=with_tables)
    adapters = fgpt.load_peft(tmp_path / "adapter", params)
    agrees(params, adapters, theirs)
    assert {p for p, x in adapters.items() if isinstance(x, fgpt.TrainableTokens)} == (
        {"wte"} if kind in ("alone", "beside LoRA") or (kind == "of both" and params.head is None)
        else {"head"} if kind == "of the head"
        else {"wte", "head"}
    )  # fmt: skip
    assert not any(path.endswith(".w") for path in adapters)


def lora(params: fgpt.GPT) -> fgpt.Adapters:
    return fgpt.lora(params, fgpt.key(0), 3, 5, r"blocks\.1\.mlp\..*")


OURS = {
    "alone": lambda p: fgpt.trainable_tokens(p, IDS),
    "of the embedding": lambda p: fgpt.trainable_tokens(p, IDS, "wte"),
    "beside LoRA": lambda p: lora(p) | fgpt.trainable_tokens(p, IDS),
    "beside LoRA, of the embedding": lambda p: lora(p) | fgpt.trainable_tokens(p, IDS, "wte"),
    "beside DoRA": lambda p: fgpt.dora(p, fgpt.key(0), 2, target=".*down") | fgpt.trainable_tokens(p, IDS),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", BASES)
def test_ours_in_peft_and_back(name: str, kind: str, tmp_path: Path):
    model = save_base(name, tmp_path / "base")
    params = fgpt.load(str(tmp_path / "base"))
    ours = with_noise(OURS[kind](params), 0.1)
    fgpt.save_peft(ours, params, tmp_path / "adapter", "base")
    assert_adapters_identical(fgpt.load_peft(tmp_path / "adapter", params), ours)
    agrees(params, ours, peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_new_tokens_of_theirs(name: str, tmp_path: Path):
    """Rows that their base has made for new tokens: the base with them reads the file, and the old one refuses it."""
    model = save_base(name, tmp_path / "base")
    model.resize_token_embeddings(33)
    model.save_pretrained(tmp_path / "larger")
    theirs = trained(model, lora_config(model, trainable_token_indices=[31, 32]))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    larger = fgpt.load(str(tmp_path / "larger"))
    adapters = fgpt.load_peft(tmp_path / "adapter", larger)
    with torch.no_grad():
        close(fgpt.apply(fgpt.adapt(larger, adapters), X + 2), theirs(X + 2).logits, 1e-5)
    with pytest.raises(InputError, match="token 31 has no row at wte"):
        fgpt.load_peft(tmp_path / "adapter", fgpt.load(str(tmp_path / "base")))


NO_PLACE: dict[str, tuple[Any, str]] = {
    "ia3": (lambda p: fgpt.ia3(p) | fgpt.trainable_tokens(p, IDS), "holds IA3, TrainableTokens in one"),
    "norms": (lambda p: fgpt.trainable_leaves(p, "ln_f.*") | fgpt.trainable_tokens(p, IDS), "Tensor, TrainableTokens"),
    "positions": (
        lambda p: fgpt.trainable_tokens(p, IDS, "blocks.0.mlp.up"),
        "no place for trainable tokens on",
    ),
    "tied twice": (
        lambda p: fgpt.trainable_tokens(p, IDS) | {"head": fgpt.trainable_tokens(p, IDS)["wte"]},
        "PEFT ties rows of the head",
    ),
    "LoRA of the head": (
        lambda p: fgpt.lora(p.untie(), fgpt.key(0), 2, target="head") | fgpt.trainable_tokens(p, IDS),
        "PEFT ties trainable tokens of a tied wte to the head",
    ),
    "whole": (
        lambda p: lora(p) | fgpt.trainable_leaves(p, "wte.w") | fgpt.trainable_tokens(p, IDS),
        "trains wte as a whole or some of its rows",
    ),
    "two lists": (
        lambda p: {"wte": fgpt.trainable_tokens(p, [1])["wte"], "head": fgpt.trainable_tokens(p, [2])["wte"]},
        "one list of ids for wte and head",
    ),
}


@pytest.mark.parametrize("kind", NO_PLACE)
def test_what_peft_has_no_place_for(kind: str, tmp_path: Path):
    make, error = NO_PLACE[kind]
    save_base("gpt2", tmp_path / "base")
    params = fgpt.load(str(tmp_path / "base"))
    with pytest.raises(InputError, match=f"{error}.*save_adapters"):
        fgpt.save_peft(make(params), params, tmp_path / "adapter", "base")


WRONG: dict[str, tuple[dict[str, Any], Any, str]] = {
    "ids": ({"trainable_token_indices": "x"}, None, "expected a list of token ids"),
    "no ids": ({"trainable_token_indices": None}, None, "3 rows of trainable tokens on wte; .* has none"),
    "too few": ({"trainable_token_indices": [1, 2]}, None, "3 rows .* has 2 ids"),
    "twice": ({"trainable_token_indices": [1, 2, 1]}, None, "token 1 is given twice"),
    "beyond": ({"trainable_token_indices": [1, 2, 31]}, None, "token 31 has no row at wte"),
    "name": ({"trainable_token_indices": {"h": [1]}}, None, "names 'h', which is no embedding or head"),
    "no rows": (
        {},
        lambda t: {k: x for k, x in t.items() if "delta" not in k},
        "no rows of the trainable tokens on",
    ),
    "a vector": ({}, lambda t: {k: x[0] if "delta" in k else x for k, x in t.items()}, "expected rows of a floating"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files(kind: str, tmp_path: Path):
    changes, change, error = WRONG[kind]
    save_base("gpt2", tmp_path / "base")
    params, folder = fgpt.load(str(tmp_path / "base")), tmp_path / "adapter"
    fgpt.save_peft(OURS["beside LoRA"](params), params, folder, "base")
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if change:
        save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=error):
        fgpt.load_peft(folder, params)
