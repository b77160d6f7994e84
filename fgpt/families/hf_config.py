"""Fields of a Hugging Face `config.json`, each checked when it is read: sizes, numbers, flags, activations and RoPE.

A field that asks for what we do not compute is an error, never a silent default.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fgpt.errors import InputError, short_repr
from fgpt.kernels.rotary import DynamicScaling, YarnScaling
from fgpt.model import Config

MAX_SIZE, MAX_LAYERS = 1 << 24, 1 << 10
"""The largest size, and number of layers, that a config may have: far above any model's, and far below what would fill
the memory with the names of layers, or overflow the size of a tensor.
"""


def require_positive_ints(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises InputError if one of `names` is missing or no integer from 1 to MAX_SIZE."""
    bad = [name for name in names if type(config.get(name)) is not int or not 1 <= config[name] <= MAX_SIZE]
    if bad:
        got = f"{bad[0]}={short_repr(config[bad[0]])}" if bad[0] in config else f"no {bad[0]}"
        raise InputError(f"config.json: expected integers above 0 for {', '.join(bad)}, up to {MAX_SIZE}; got {got}")


def optional_size(config: Mapping[str, Any], name: str, default: int) -> int:
    """A size, or `default` if the field is missing, null or 0. Raises InputError as `require_positive_ints` does."""
    if name not in config or config[name] in (None, 0):
        return default
    require_positive_ints(config, [name])
    return config[name]


def number(config: Mapping[str, Any], name: str, default: float) -> float:
    """A field that is no size. Raises InputError for anything but a number from 0 to 1e15."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e15:  # NaN is not
        raise InputError(f"config.json: expected a number from 0 to 1e15 for {name}, got {short_repr(value)}")
    return float(value)


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """A field that is true or false. Raises InputError for anything else: "false", for one, is true to Python."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"config.json: expected true or false for {name}, got {short_repr(value)}")
    return value


LLAMA_SIZES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "d_mlp",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_ctx",
}
"""Hugging Face's names of sizes, and ours, in the families since GPT-NeoX."""


def sizes(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """The sizes that a config must have, by our names. Raises InputError as `require_positive_ints` does, and for more
    than MAX_LAYERS layers.
    """
    require_positive_ints(config, names)
    fields = {ours: config[hub] for hub, ours in names.items()}
    if fields["n_layer"] > MAX_LAYERS:
        raise InputError(f"config.json: expected at most {MAX_LAYERS} layers, got {fields['n_layer']}")
    return fields


def sizes_to_hf(cfg: Config, names: Mapping[str, str]) -> dict[str, int]:
    """The inverse of `sizes`."""
    return {hub: getattr(cfg, ours) for hub, ours in names.items()}


def require_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises InputError if a field has another value than the one we compute with, which an absent one has too."""
    for name, value in values.items():
        if config.get(name, value) != value:
            raise InputError(f"config.json: {name}={short_repr(config[name])} is not supported, expected {value!r}")


ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
"""Hugging Face's names of activations, and ours. Names of one function differ only in their rounding."""


def activation(config: Mapping[str, Any], name: str, default: str) -> Any:
    """Our name of the activation that a config has. Raises InputError for has a value that is not supported."""
    value = config.get(name, default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"config.json: {name}={short_repr(value)} is not supported, expected one of {known}")
    return ACTIVATIONS[value]


def activation_to_hf(cfg: Config) -> str:
    """Hugging Face's first name of our activation."""
    return next(hub for hub, ours in ACTIVATIONS.items() if ours == cfg.activation)


LLAMA_3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""The fields of Llama 3's scaling, in the order of `rope_scaling` in our config."""


ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")


def rope(config: Mapping[str, Any], sizes: Mapping[str, int], dim: int) -> dict[str, Any]:
    """The `rope_theta`, `rope_scaling` and `n_ctx` of our config, from the fields of old and new configs.

    Args:
        config: The fields of a `config.json`.
        sizes: The sizes of the config by our names; of them, `n_ctx` is read.
        dim: Number of rotated components of a head.

    Raises InputError for a scaling that we do not compute.
    """
    scaling, context = rope_fields(config), sizes["n_ctx"]
    fields = scaling if "rope_theta" in scaling else config
    base = _positive(fields, "rope_theta" if "rope_theta" in fields else "rotary_emb_base", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise InputError(f"config.json: rope_type={short_repr(kind)} is not supported, expected one of {known}")
    required = {"linear": ("factor",), "dynamic": ("factor",), "llama3": LLAMA_3}.get(kind, ())
    if missing := [name for name in required if name not in scaling]:
        raise InputError(f"config.json: rope_scaling of type {kind!r} lacks a number for {missing[0]!r}")
    rope_scaling: Any = None
    if kind == "linear":
        rope_scaling = (_positive(scaling, "factor"), 1.0, 4.0, 0.0)
    elif kind == "llama3":
        rope_scaling = tuple(_positive(scaling, name) for name in LLAMA_3)
        if rope_scaling[1] >= rope_scaling[2]:
            raise InputError(f"config.json: expected low_freq_factor below high_freq_factor, got {rope_scaling[1:3]}")
    elif kind == "yarn":
        rope_scaling = _yarn(config, scaling, context)
        if base <= 1 or dim < 2:
            raise InputError(f"config.json: yarn needs rope_theta above 1 and rotated pairs, got {base} and {dim}")
        try:
            rope_scaling.ramp(dim, base)
        except (ValueError, OverflowError):
            raise InputError(
                f"config.json: the values of yarn are too far apart: {short_repr(dict(scaling))}"
            ) from None
    elif kind == "dynamic":
        rope_scaling = DynamicScaling(_positive(scaling, "factor"), context)
        if rope_scaling.factor < 1 or rope_scaling.factor * context > MAX_SIZE or dim <= 2:
            raise InputError(
                f"config.json: a dynamic rope needs a factor of 1 or more, up to {MAX_SIZE} positions, and 4 rotated "
                f"components or more; got {rope_scaling.factor}, {context} positions and {dim} components"
            )
        context = int(rope_scaling.factor * context)
    return {"rope_theta": base, "rope_scaling": rope_scaling, "n_ctx": context}


def _yarn(config: Mapping[str, Any], scaling: Mapping[str, Any], context: int) -> YarnScaling:
    """YaRN as transformers reads it: what is left out has the values of the paper.

    Source: Peng et al. 2023 (YaRN), section 3.4; DeepSeek-AI 2024 (DeepSeek-V2) for the two mscale.
    """
    name = "original_max_position_embeddings"
    original = _positive(config if config.get(name) is not None else scaling, name, float(context))
    factor = _optional_positive(scaling, "factor") or context / original
    size, whole = _optional_positive(scaling, "mscale"), _optional_positive(scaling, "mscale_all_dim")
    grown = math.log(factor) if factor > 1 else 0.0
    usual = (0.1 * size * grown + 1) / (0.1 * whole * grown + 1) if size and whole else 0.1 * grown + 1
    return YarnScaling(
        factor,
        _optional_positive(scaling, "beta_fast") or 32.0,
        _optional_positive(scaling, "beta_slow") or 1.0,
        original,
        _optional_positive(scaling, "attention_factor") or usual,
        flag(scaling, "truncate", True),
    )


def _optional_positive(fields: Mapping[str, Any], name: str) -> float | None:
    """A number above 0, or None if it is missing, null or 0."""
    return None if fields.get(name) is None else number(fields, name, 0.0) or None


def rope_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a config's rope_parameters or rope_scaling. Raises InputError if they are no object."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise InputError(f"config.json: rope_scaling={short_repr(scaling)} is not supported, expected its fields")
    return scaling


def _positive(config: Mapping[str, Any], name: str, default: float = 0.0) -> float:
    if not (value := number(config, name, default)):
        raise InputError(f"config.json: expected a number above 0 for {name}, got {short_repr(config.get(name))}")
    return value


def rope_to_hf(cfg: Config) -> dict[str, Any]:
    """The inverse of `rope`, in fields that old and new readers know."""
    if (stretch := cfg.rope_scaling) is None:
        scaling = None
    elif isinstance(stretch, YarnScaling):
        scaling = {"rope_type": "yarn"} | stretch._asdict()
        scaling["original_max_position_embeddings"] = int(scaling.pop("context"))
    elif isinstance(stretch, DynamicScaling):
        scaling = {"rope_type": "dynamic", "factor": stretch.factor}
        return {"rope_theta": cfg.rope_theta, "rope_scaling": scaling, "max_position_embeddings": stretch.context}
    elif stretch[3] == 0:
        scaling = {"rope_type": "linear", "factor": stretch[0]}
    else:
        scaling = {"rope_type": "llama3"} | dict(zip(LLAMA_3, stretch, strict=True))
        scaling["original_max_position_embeddings"] = int(stretch[3])
    return {"rope_theta": cfg.rope_theta, "rope_scaling": scaling}
