"""The Llama line's tensors on the hub, and our tree: Llama 1 to 3 and all that share its layout (TinyLlama, SmolLM2),
Mistral, whose layers attend within a window, Qwen 2 and 2.5, whose q, k and v have biases, and Qwen 3, whose q and k
are normed.
"""

from collections.abc import Mapping
from typing import Any

from fgpt.errors import InputError, short_repr
from fgpt.families.hf_config import (
    LLAMA_SIZES,
    MAX_SIZE,
    activation,
    activation_to_hf,
    flag,
    number,
    optional_size,
    require_positive_ints,
    rope,
    rope_to_hf,
    sizes,
    sizes_to_hf,
)
from fgpt.families.mapping import Family, TensorMapping, layer_mappings, leaf_paths, one_to_one
from fgpt.model import Config

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FULL, SLIDING = "full_attention", "sliding_attention"
"""What layer_types says of a layer."""

LAYERS = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def config_from_hf(config: Mapping[str, Any]) -> Config:
    """Our config of a Hugging Face `config.json`.

    Raises InputError if a field is missing, or has a value that is not supported.
    """
    shape = sizes(config, LLAMA_SIZES)
    kind, heads = config.get("model_type", "llama"), config["num_attention_heads"]
    biases: set[str] = set()
    if kind == "qwen2":
        biases = {"q", "k", "v"}
    elif kind != "mistral":
        biases |= {"q", "k", "v", "o"} if flag(config, "attention_bias", False) else set()
        biases |= {"up", "down", "gate"} if flag(config, "mlp_bias", False) else set()
    d_head = optional_size(config, "head_dim", 128 if kind == "qwen3" else config["hidden_size"] // heads)
    if d_head * heads > MAX_SIZE:
        raise InputError(f"config.json: {heads} heads of {d_head} are too many: expected {MAX_SIZE} components at most")
    fewer = kind == "mistral" and "num_key_value_heads" not in config
    kv = optional_size(config, "num_key_value_heads", 8 if fewer else heads)
    fields: dict[str, Any] = shape | rope(config, shape, d_head) | window(config, kind, shape["n_layer"])
    return Config(
        **fields,
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        tie_word_embeddings=flag(config, "tie_word_embeddings", False),
        n_kv=None if kv == heads else kv,
        d_head=None if d_head * heads == config["hidden_size"] else d_head,
        activation=activation(config, "hidden_act", "silu"),
        norm_type="rms",
        qk_norm=kind == "qwen3",
        gated_mlp=True,
        biases=frozenset(biases),
        rotary_dim=d_head,
    )


def window(config: Mapping[str, Any], kind: str, n_layer: int) -> dict[str, Any]:
    """The `sliding_window` and `full_layers` of our config. A Llama has none, the layers of a Mistral all do, and those
    of a Qwen from one on, or as layer_types has them.

    Raises InputError if the fields do not fit one another.
    """
    slides = {"llama": False, "mistral": True}.get(kind) or flag(config, "use_sliding_window", False)
    size = config.get("sliding_window", 4096) if slides else None
    if size is not None:
        require_positive_ints({"sliding_window": size}, ["sliding_window"])
    first = config.get("max_window_layers", 28) if kind in ("qwen2", "qwen3") else 0
    if type(first) is not int or first < 0:
        raise InputError(f"config.json: expected an integer for max_window_layers, got {short_repr(first)}")
    types = config.get("layer_types") or None
    if types is None:
        types = [SLIDING if size and i >= first else FULL for i in range(n_layer)]
    if not isinstance(types, list) or any(x not in (FULL, SLIDING) for x in types) or len(types) != n_layer:
        raise InputError(
            f"config.json: layer_types other than {FULL!r} and {SLIDING!r}, one for each of {n_layer} layers, are not "
            f"supported; got {short_repr(types)}"
        )
    if SLIDING in types and not size:
        raise InputError(
            f"config.json: layer_types other than {FULL!r} need a sliding_window, and use_sliding_window true"
        )
    if kind == "mistral" and size and FULL in types:
        raise InputError(f"config.json: layer_types of {FULL!r} are not supported in a Mistral that has a window")
    if SLIDING not in types:
        return {}
    return {"sliding_window": size, "full_layers": tuple(i for i, x in enumerate(types) if x == FULL)}


def window_to_hf(cfg: Config, kind: str) -> dict[str, Any]:
    """The inverse of `window`."""
    if cfg.sliding_window is None:
        return {}
    if kind == "mistral":
        return {"sliding_window": cfg.sliding_window}
    types = [FULL if i in cfg.full_layers else SLIDING for i in range(cfg.n_layer)]
    first = types.index(SLIDING) if SLIDING in types else cfg.n_layer
    return {
        "use_sliding_window": True,
        "sliding_window": cfg.sliding_window,
        "max_window_layers": first,
        "layer_types": types,
    }


def config_to_hf(cfg: Config) -> dict[str, Any]:
    """The Hugging Face `config.json` of our config."""
    other = "llama" if cfg.sliding_window is None else "mistral"
    kind = "qwen3" if cfg.qk_norm else "qwen2" if cfg.biases == {"q", "k", "v"} else other
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **sizes_to_hf(cfg, LLAMA_SIZES),
        "hidden_act": activation_to_hf(cfg),
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_size,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        **rope_to_hf(cfg),
        **window_to_hf(cfg, kind),
    }
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = "q" in cfg.biases
    return config | {"mlp_bias": "gate" in cfg.biases} if kind == "llama" else config


def tensor_mappings(cfg: Config) -> list[TensorMapping]:
    """The tensors of Hugging Face's model, and our leaves in each."""
    bare = leaf_paths(cfg)
    mappings = one_to_one({"wte.w": "embed_tokens.weight"})
    for i in range(cfg.n_layer):
        mappings += layer_mappings({f"blocks.{i}.{ours}": f"layers.{i}.{hub}" for ours, hub in LAYERS.items()}, bare)
    return mappings + layer_mappings({"ln_f": "norm"} | ({} if cfg.tie_word_embeddings else {"head": "lm_head"}), bare)


LLAMA = Family(
    model_types=tuple(ARCHITECTURES),
    prefix="model.",
    buffers=(".rotary_emb.inv_freq",),  # angles that old checkpoints carry
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensor_mappings=tensor_mappings,
)
