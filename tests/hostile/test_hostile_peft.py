"""Spoiled PEFT adapters."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import tiny, with_noise
from builders.hostile_files import LLAMA, assert_enough, assert_same_reading, outcome_of, time_limit
from builders.mutations import (
    DEEP,
    bit_flips,
    each_in_turn,
    join_safetensors,
    length_mutations,
    mutations,
    split_safetensors,
    structural_mutations,
    truncations,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import fgpt
from fgpt.errors import InputError
from fgpt.io.peft.adapter_files import load_peft

# ----------------------------------------------------------------------------------------------------------------- PEFT


HUB = {"self_attn.q_proj": "attn.q", "self_attn.v_proj": "attn.v", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}
MADE: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "lora": lambda p: fgpt.lora(p, fgpt.key(0), 2, 6, r".*\.(q|v)"),
    "dora": lambda p: fgpt.dora(p, fgpt.key(0), 2, 6, r".*\.(q|up)"),
    "ia3": lambda p: fgpt.ia3(p, r".*\.v", r".*\.down"),
    "norms": lambda p: fgpt.trainable_leaves(p, r".*ln_.\.w"),
}


def adapters_said(folder: Path) -> dict[str, Any]:
    """An adapter's tensors and numbers by our paths, of what PEFT's two files say, by PEFT's own rules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found: dict[str, Any] = {}
    for name, x in load_file(folder / "adapter_model.safetensors").items():
        module, part = re.fullmatch(
            r"(?:base_model\.model\.)(?:model\.)?(.*?)\."
            r"(lora_A|lora_B|lora_magnitude_vector|ia3_l|ln_tuning_layers)(?:\.default)?(?:\.weight)?",
            name,
        ).groups()  # pyright: ignore[reportOptionalMemberAccess]
        layer = re.sub(r"layers\.(\d+)\.", r"blocks.\1.", module)
        for hub_name, ours in (HUB | {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}).items():
            layer = layer.replace(hub_name, ours)
        layer = "ln_f" if layer == "norm" else layer
        found.setdefault(layer, {})[part] = x.float()
        if part == "lora_A":

            def by(patterns: Any, default: Any, module: str = module) -> Any:
                known = (n for p, n in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", f"model.{module}"))
                return next(known, default)

            rank, alpha = (
                by(config.get("rank_pattern"), config.get("r")),
                by(config.get("alpha_pattern"), config["lora_alpha"]),
            )
            found[layer] |= {"r": rank or x.shape[0], "alpha": alpha, "rs": bool(config.get("use_rslora"))}
            found[layer] |= {"dropout": config.get("lora_dropout") or 0}
    return found


def check_peft(adapters: Any, folder: Path) -> None:
    expected = adapters_said(folder)
    assert {path.removesuffix(".w") if isinstance(x, Tensor) else path for path, x in adapters.items()} == set(expected)
    x: Any
    for path, x in adapters.items():
        parts = expected[path.removesuffix(".w") if isinstance(x, Tensor) else path]
        lora = x.lora if isinstance(x, fgpt.DoRA) else x
        if isinstance(x, Tensor):
            assert_same_reading({"": x}, {"": parts["ln_tuning_layers"]})
        elif isinstance(lora, fgpt.LoRA):
            assert_same_reading({"a": lora.a, "b": lora.b}, {"a": parts["lora_A"], "b": parts["lora_B"]})
            assert lora.a.shape[0] == parts["r"]
            assert (lora.alpha, lora.rs, lora.dropout) == (parts["alpha"], parts["rs"], parts["dropout"])
            assert isinstance(x, fgpt.DoRA) == ("lora_magnitude_vector" in parts)
            if isinstance(x, fgpt.DoRA):
                assert_same_reading({"m": x.m}, {"m": parts["lora_magnitude_vector"].flatten()})
        else:
            assert isinstance(lora, fgpt.IA3)
            assert_same_reading({"": lora.row if lora.col is None else lora.col}, {"": parts["ia3_l"].flatten()})


def with_patterns(params: fgpt.GPT, folder: Path) -> None:
    """Add a LoRA of another rank and alpha to the folder, as PEFT writes it."""
    path, config_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, config = load_file(path), json.loads(config_path.read_text())
    fgpt.save_peft(with_noise(fgpt.lora(params, fgpt.key(1), 3, 5, r".*\.up")), params, folder, "base")
    save_file(tensors | load_file(path), path, {"format": "pt"})
    more = {name: {r"layers\.0\.mlp\.up_proj": x} for name, x in (("rank_pattern", 3), ("alpha_pattern", 5))}
    targets = [*config["target_modules"], "mlp.up_proj"]
    config_path.write_text(json.dumps(config | more | {"target_modules": targets}))


@pytest.mark.parametrize("kind", MADE)
def test_spoiled_peft_adapters(kind: str, tmp_path: Path):
    params = tiny(n_layer=1, **LLAMA)
    fgpt.save_peft(with_noise(MADE[kind](params)), params, tmp_path, "base")
    if kind == "lora":
        with_patterns(params, tmp_path)
    path, config_path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    data, config = path.read_bytes(), json.loads(config_path.read_text())
    header, body = split_safetensors(data)

    def read() -> None:
        if adapters := outcome_of("peft", tmp_path, lambda: load_peft(tmp_path, params)):
            check_peft(adapters, tmp_path)

    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        read()

    def with_config(text: str) -> None:
        config_path.write_bytes(text.encode("utf-8", "surrogatepass"))
        read()

    with_config(json.dumps(config))
    assert load_peft(tmp_path, params)
    for corrupt in (
        *structural_mutations(data),
        *length_mutations(data)[::4],
        *truncations(data, 5),
        *bit_flips(data, 15, len(data) - len(body)),
    ):
        check(corrupt)
    each_in_turn(20, mutations(header), lambda text: check(join_safetensors(text, body)))
    path.write_bytes(data)
    for text in DEEP:
        with_config(text)
    each_in_turn(40, mutations(config), with_config)
    assert_enough("peft", len(MADE))


# ------------------------------------------------------------------------------------------------ what has been mended


ADAPTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a pattern without end": ("lora", {"alpha_pattern": {r"(\w+\.?)+x": 1, "(a|a?)*.": 2}}, ""),
    "another rank": ("lora", {"r": 4, "rank_pattern": {}}, "has a lora_A of rank 2; adapter_config.json says 4"),
    "text for false": ("lora", {"use_rslora": "false"}, "expected true or false for use_rslora, got 'false'"),
    "no number": ("lora", {"lora_alpha": math.nan, "alpha_pattern": {}}, "expected a number for lora_alpha, got nan"),
    "a giant": ("lora", {"lora_alpha": 10**400, "alpha_pattern": {}}, "expected a number for lora_alpha, got 1000"),
    "true": ("lora", {"lora_alpha": True, "alpha_pattern": {}}, "expected a number for lora_alpha, got True"),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapter_configs_that_were_misread(name: str, tmp_path: Path):
    kind, change, expected = ADAPTED[name]
    params = tiny(n_layer=1, **LLAMA)
    fgpt.save_peft(MADE[kind](params), params, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    if not expected:
        with time_limit():
            assert load_peft(tmp_path, params)
        return
    with pytest.raises(InputError, match=expected):
        load_peft(tmp_path, params)


def test_adapters_by_two_names(tmp_path: Path):
    """Of two tensors for one place, none is the right one."""
    params = tiny(n_layer=1, **LLAMA)
    fgpt.save_peft(MADE["lora"](params), params, tmp_path, "base")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file(tensors | {name.replace("lora_A", "lora_A.default"): 2 * tensors[name]}, path)
    with pytest.raises(InputError, match="is there by another name too"):
        load_peft(tmp_path, params)
    doubled = {x.replace("model.model.", "model."): 2 * y for x, y in tensors.items() if "q_proj" in x}
    assert not doubled.keys() & tensors.keys()
    save_file(tensors | doubled, path)
    with pytest.raises(InputError, match="two adapters are on one layer"):
        load_peft(tmp_path, params)
    save_file(tensors | {name: tensors[name].int()}, path)
    with pytest.raises(InputError, match="expected a floating dtype, got int32"):
        load_peft(tmp_path, params)
