"""Spoiled configs, and configs that were once misread."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.hostile_files import AGAIN, assert_enough, outcome_of
from builders.mutations import DEEP, each_in_turn, mutations

import fgpt
from fgpt.errors import InputError
from fgpt.families import hf_config
from fgpt.io import models
from fgpt.kernels.rotary import DynamicScaling, YarnScaling, rope_cos_sin
from fgpt.model import Config

# -------------------------------------------------------------------------------------------------------------- configs


GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 31}
GPT2 |= {"n_inner": 40, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True}
GPT2 |= {"scale_attn_weights": True, "torch_dtype": "float32", "bos_token_id": 30}
GPTJ = {k: v for k, v in GPT2.items() if k not in ("scale_attn_weights",)}
GPTJ |= {"model_type": "gptj", "rotary_dim": 4, "tie_word_embeddings": False}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": 31}
SIZES |= {"max_position_embeddings": 24, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
STRETCHED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED |= {"original_max_position_embeddings": 8}
WARPED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4}
WARPED |= {"beta_fast": 8, "beta_slow": 1.0, "attention_factor": 1.5, "truncate": False, "mscale": 1.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gptj": GPTJ,
    "neox": SIZES
    | {"model_type": "gpt_neox", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.5}
    | {"use_parallel_residual": True, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "llama": SIZES
    | {"model_type": "llama", "hidden_act": "silu", "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6}
    | {"attention_bias": False, "mlp_bias": False, "rope_theta": 1e4, "rope_scaling": STRETCHED}
    | {"layer_types": ["full_attention"]},
    "mistral": SIZES
    | {"model_type": "mistral", "hidden_act": "silu", "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6}
    | {"sliding_window": 3, "rope_parameters": WARPED},
    "qwen2": SIZES
    | {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "layer_types": ["sliding_attention"]}
    | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
}
SAME = {
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "d_model": ("n_embd", "hidden_size"),
    "n_ctx": ("n_positions", "max_position_embeddings"),
    "vocab_size": ("vocab_size",),
    "d_mlp": ("n_inner", "intermediate_size"),
    "norm_eps": ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps"),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "kv_heads": ("num_key_value_heads",),
    "head_size": ("head_dim",),
    "parallel_residual": ("use_parallel_residual",),
}
"""Fields of ours, and what the hub calls them: where they are there, they are equal."""


def check_config(cfg: Config, fields: dict[str, Any]) -> None:
    for ours, hub_name in SAME.items():
        for name in hub_name:
            if fields.get(name) is not None and not (
                name == "use_parallel_residual" and fields["model_type"] != "gpt_neox"
            ):
                if name in ("num_key_value_heads", "head_dim") and fields["model_type"] != "llama":
                    continue
                if ours == "n_ctx" and isinstance(cfg.rope_scaling, DynamicScaling):
                    continue
                assert getattr(cfg, ours) == fields[name], name
                assert type(getattr(cfg, ours)) in (type(fields[name]), float), name
    assert math.isfinite(cfg.norm_eps)
    assert cfg.norm_eps >= 0
    assert math.isfinite(cfg.rope_theta)
    assert cfg.rope_theta > 0
    if cfg.rotary_dim and fields["model_type"] != "gptj":
        scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        assert cfg.rope_theta == scaling.get("rope_theta", fields.get("rope_theta", fields.get("rotary_emb_base", 1e4)))
        if scaling.get("rope_type", scaling.get("type")) == "yarn":
            assert isinstance(cfg.rope_scaling, YarnScaling)
            assert all(math.isfinite(x) and x > 0 for x in cfg.rope_scaling[:-1])
            if cfg.rotary_dim % 2 == 0:  # else the model is refused as soon as it has leaves
                rope_cos_sin(torch.arange(9), cfg.rotary_dim, cfg.rope_theta, cfg.rope_scaling)
        if scaling.get("rope_type", scaling.get("type")) == "dynamic":
            assert isinstance(cfg.rope_scaling, DynamicScaling)
            assert cfg.rope_scaling.context == fields["max_position_embeddings"] <= cfg.n_ctx
        if scaling.get("rope_type") == "llama3":
            assert cfg.rope_scaling is not None
            assert cfg.rope_scaling == tuple(scaling[name] for name in hf_config.LLAMA_3)
            assert all(math.isfinite(x) and x > 0 for x in cfg.rope_scaling)
        if cfg.rope_scaling is None:
            assert scaling.get("rope_type", scaling.get("type", "default")) == "default"
    if fields["model_type"] == "llama":
        assert ("q" in cfg.biases) is bool(fields.get("attention_bias"))
        assert ("gate" in cfg.biases) is bool(fields.get("mlp_bias"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_spoiled_configs(kind: str, tmp_path: Path):
    path, value = tmp_path / "config.json", CONFIGS[kind]
    path.write_text(json.dumps(value))
    cfg = models._config(models._open(tmp_path))
    check_config(cfg, value)
    params = fgpt.init(cfg, fgpt.key(0))
    fgpt.save(params, tmp_path)

    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        if cfg := outcome_of("configs", tmp_path, lambda: models._config(models._open(tmp_path))):
            check_config(cfg, json.loads(text))
        options: Any
        for options in ({}, {"quantize": "int8"}):
            if params := outcome_of(AGAIN, tmp_path, lambda options=options: fgpt.load(str(tmp_path), **options)):
                assert params.cfg == cfg

    for text in DEEP:
        check(text)
    for name, x in value.items():
        if type(x) is int:
            for size in (10**9, 10**12, 2**63, 10**400):
                check(json.dumps(value | {name: size}))
    each_in_turn(60, mutations(value), check)
    assert_enough("configs", len(CONFIGS))


# ------------------------------------------------------------------------------------------------ what has been mended


CONFIGURED: dict[str, tuple[str, dict[str, Any], str]] = {
    "layers without end": ("gpt2", {"n_layer": 10**6}, "expected at most 1024 layers, got 1000000"),
    "a giant table": (
        "gpt2",
        {"vocab_size": 10**12},
        "above 0 for vocab_size, up to 16777216; got vocab_size=1",
    ),
    "giant heads": ("llama", {"head_dim": 2**23, "num_attention_heads": 4}, "4 heads of 8388608 are too many"),
    "inner text": ("gpt2", {"n_inner": "40"}, "above 0 for n_inner, up to 16777216; got n_inner='40'"),
    "a list for a type": ("gpt2", {"model_type": ["gpt2"]}, r"model_type is \['gpt2'\], expected one of gpt2"),
    "a list for an activation": ("gpt2", {"activation_function": []}, r"activation_function=\[\] is not supported"),
    "text for false": ("llama", {"attention_bias": "false"}, "expected true or false for attention_bias, got 'false'"),
    "a null for a flag": ("llama", {"tie_word_embeddings": None}, "true or false for tie_word_embeddings, got None"),
    "text for eps": ("gpt2", {"layer_norm_epsilon": "1e-5"}, "from 0 to 1e15 for layer_norm_epsilon, got '1e-5'"),
    "no number for eps": ("llama", {"rms_norm_eps": math.nan}, "from 0 to 1e15 for rms_norm_eps, got nan"),
    "an endless theta": ("llama", {"rope_theta": math.inf}, "from 0 to 1e15 for rope_theta, got inf"),
    "theta of 0": ("llama", {"rope_theta": 0}, "a number above 0 for rope_theta, got 0"),
    "a giant theta": ("llama", {"rope_theta": 10**400}, "from 0 to 1e15 for rope_theta, got 1000000"),
    "factors that are one": (
        "llama",
        {"rope_scaling": STRETCHED | {"low_freq_factor": 4}},
        "expected low_freq_factor below high_freq_factor",
    ),
    "rope that is a list": ("neox", {"rope_parameters": [1]}, r"rope_scaling=\[1\] is not supported"),
    "rotary of nothing": (
        "neox",
        {"rope_parameters": {"partial_rotary_factor": math.nan}},
        "from 0 to 1e15 for partial_rotary_factor, got nan",
    ),
    "a list of lists of types": ("llama", {"layer_types": [[]]}, "layer_types other than 'full_attention'"),
    "a number for types": ("llama", {"layer_types": 3}, "layer_types other than 'full_attention'"),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_configs_that_were_misread(name: str, tmp_path: Path):
    kind, change, expected = CONFIGURED[name]
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[kind] | change))
    with pytest.raises(InputError, match=expected) as caught:
        models._config(models._open(tmp_path))
    assert str(tmp_path) in str(caught.value)
