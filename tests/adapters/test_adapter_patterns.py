"""The defaults of LoRA are one table; ranks, strengths and scales of layers are PEFT's."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import hf_gpt2, load_hf_model, same, tiny, with_noise
from builders.peft_adapters import TOKENS, assert_adapters_identical, assert_logits_agree

import fgpt
from fgpt.cli.training.build import build_adapters
from fgpt.layers import weight_matrices
from fgpt.recipes import Adapter, InstructionRecipe
from fgpt.recipes.pattern_options import parse_patterns
from fgpt.rng import fold_in

PARAMS = tiny(n_layer=2)
PATTERNS: dict[str, Any] = {"rank_pattern": {r".*\.up": 2, r".*\.(up|q)": 5}, "alpha_pattern": {r".*\.(up|o)": 3}}


def recipe(**adapter: Any) -> InstructionRecipe:
    return InstructionRecipe(name="x", base="nano", data=("nano",), adapter=Adapter(**adapter))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"rs": True}, {"rank": 4, "alpha": 12}])
def test_the_library_and_the_command_have_one_table(kind: Any, options: Any):
    key = fold_in(fgpt.key(0), "lora")
    ours = {"lora": fgpt.lora, "dora": fgpt.dora}[kind](PARAMS, key, **options)
    assert_adapters_identical(ours, build_adapters(recipe(kind=kind, **options), PARAMS))
    assert set(ours) == {path for path in weight_matrices(PARAMS) if path.startswith("blocks.")}


def test_the_table_is_the_documented_one():
    adapters: Any = fgpt.lora(PARAMS, fgpt.key(0))
    assert {(len(x.a), x.alpha, x.rs, x.dropout) for x in adapters.values()} == {(8, 16.0, False, 0.0)}
    stable: Any = fgpt.lora(PARAMS, fgpt.key(0), 4, rs=True)
    assert {x.scale for x in stable.values()} == {8 / 2}


def test_the_first_pattern_of_a_layer_counts():
    adapters: Any = fgpt.lora(PARAMS, fgpt.key(0), 4, **PATTERNS)
    found = {path: (len(x.a), x.alpha) for path, x in adapters.items() if path.startswith("blocks.1.")}
    assert found == {
        "blocks.1.attn.q": (5, 10.0),
        "blocks.1.attn.k": (4, 8.0),
        "blocks.1.attn.v": (4, 8.0),
        "blocks.1.attn.o": (4, 3.0),
        "blocks.1.mlp.up": (2, 3.0),
        "blocks.1.mlp.down": (4, 8.0),
    }
    text = {name: tuple(f"{k}={v}" for k, v in values.items()) for name, values in PATTERNS.items()}
    same_by_options = build_adapters(recipe(rank=4, **text), PARAMS)
    assert_adapters_identical(same_by_options, fgpt.lora(PARAMS, fold_in(fgpt.key(0), "lora"), 4, **PATTERNS))


@pytest.mark.parametrize("rs", [False, True])
def test_ranks_and_scales_are_pefts(rs: bool, tmp_path: Path):
    """PEFT's config of the same patterns gives its modules the ranks and scales that we give ours."""
    params = fgpt.fuse_qkv(load_hf_model(hf_gpt2(), tmp_path))
    modules = {"attn.qkv": "attn.c_attn", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=rs,
        target_modules=list(modules.values()),
        fan_in_fan_out=True,
        rank_pattern={r"h\.0\.mlp\.c_fc": 2},
        alpha_pattern={r"h\.\d\.attn\.c_proj": 5, r"h\.1\..*": 7},
    )
    model: Any = peft.get_peft_model(hf_gpt2(), config)
    ours: Any = fgpt.lora(
        params,
        fgpt.key(0),
        4,
        12,
        rs=rs,
        rank_pattern={r"blocks\.0\.mlp\.up": 2},
        alpha_pattern={r"blocks\.\d\.attn\.o": 5, r"blocks\.1\..*": 7},
    )
    for i in range(2):
        for path, module in modules.items():
            theirs = model.get_submodule(f"base_model.model.transformer.h.{i}.{module}")
            x = ours[f"blocks.{i}.{path}"]
            assert (len(x.a), x.scale) == (theirs.r["default"], pytest.approx(theirs.scaling["default"]))


@pytest.mark.parametrize("make", [fgpt.lora, fgpt.dora])
def test_files_keep_ranks_strengths_and_rs(make: Any, tmp_path: Path):
    """Ours come back as they were, to the bit, and PEFT computes what we do."""
    folder = tmp_path / "adapter"
    params = fgpt.fuse_qkv(load_hf_model(hf_gpt2(), tmp_path))
    patterns = {"rank_pattern": {r".*\.up": 2}, "alpha_pattern": {r".*\.o": 3}}
    fresh = make(params, fgpt.key(0), 4, rs=True, **patterns)
    adapters: Any = with_noise(fresh, 0.1)
    fgpt.save_peft(adapters, params, folder, "gpt2")
    back: Any = fgpt.load_peft(folder, params)
    lora_of = (lambda x: x.lora) if make is fgpt.dora else (lambda x: x)
    settings = [
        {path: (len(lora_of(x).a), lora_of(x).alpha, lora_of(x).rs) for path, x in y.items()} for y in (adapters, back)
    ]
    assert settings[0] == settings[1]
    assert (
        same(back, adapters)
        or (fgpt.apply(fgpt.adapt(params, back), TOKENS) - fgpt.apply(fgpt.adapt(params, adapters), TOKENS)).abs().max()
        < 1e-5
    )
    model = peft.PeftModel.from_pretrained(hf_gpt2(), folder)
    assert_logits_agree(params, adapters, model)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank_pattern": {"none": 2}}, "rank_pattern 'none' matches none of blocks.0.attn.q"),
        ({"alpha_pattern": {"none": 2}}, "alpha_pattern 'none' matches none of blocks.0.attn.q"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern '\(' is not a regular expression"),
        ({"rank_pattern": {r".*\.q": 99}}, "rank 99 on blocks.0.attn.q: expected 1 to 16"),
        ({"rank_pattern": {r".*\.q": 0}}, "rank 0 on blocks.0.attn.q"),
    ],
)
def test_bad_patterns(options: Any, says: str):
    with pytest.raises(fgpt.InputError, match=says):
        fgpt.lora(PARAMS, fgpt.key(0), 2, **options)


@pytest.mark.parametrize("text", ["q", "=3", "q=", "q=x", "q=0", "q=-1", "q=nan", "q=inf"])
def test_a_malformed_option(text: str):
    with pytest.raises(fgpt.InputError, match=r"expected REGEX=NUMBER, a number above 0, such as \.\*q=16"):
        parse_patterns([text], "--adapter.rank-pattern", ".*q=16")
    assert parse_patterns([r"(?=.*q).*=2.5"], "--x", "y") == {r"(?=.*q).*": 2.5}


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"rank_pattern": ("q=1.5",)}, "--adapter.rank-pattern: a rank is 1.5: expected an integer"),
        ({"kind": "full", "rs": True}, "--adapter.rs is of --adapter.kind lora and dora: full has none"),
        ({"kind": "ia3", "rank_pattern": ("q=2",)}, "--adapter.rank-pattern is of --adapter.kind lora and dora"),
        ({"alpha_pattern": ("(=2",)}, "is not a regular expression"),
    ],
)
def test_bad_options(adapter: Any, says: str):
    with pytest.raises(fgpt.InputError, match=says):
        Adapter(**adapter).check()
    assert torch.is_grad_enabled()
