"""The Llama line's tensors on the hub, and our tree: Llama 1 to 3 and all that share its layout (TinyLlama, SmolLM2),
Qwen 2 and 2.5, whose q, k and v have biases, and Qwen 3, whose q and k are normed.
"""

from collections.abc import Mapping
from typing import Any

from fgpt.errors import InputError
from fgpt.families.names import (
    LLAMA_SIZES,
    MOST,
    Family,
    Stored,
    activation,
    activation_to_hf,
    flag,
    layers,
    number,
    only,
    paths,
    rope,
    rope_to_hf,
    size,
    sizes,
    sizes_to_hf,
    whole,
)
from fgpt.model import Config

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

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
    """Our config of a hub `config.json`. Raises InputError where a field is missing, or one that we do not compute."""
    found = sizes(config, LLAMA_SIZES)
    only(config, {"use_sliding_window": False})
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise InputError("config.json: layer_types other than 'full_attention' are not supported")
    kind, heads = config.get("model_type", "llama"), config["num_attention_heads"]
    if kind == "qwen2":
        biases = "q k v"
    else:
        attention = "q k v o" if flag(config, "attention_bias", False) else ""
        biases = f"{attention} {'up down gate' if flag(config, 'mlp_bias', False) else ''}".strip()
    d_head = size(config, "head_dim", 128 if kind == "qwen3" else config["hidden_size"] // heads)
    if d_head * heads > MOST:
        raise InputError(f"config.json: {heads} heads of {d_head} are too many: expected {MOST} components at most")
    kv = size(config, "num_key_value_heads", heads)
    return Config(
        **found,
        eps=number(config, "rms_norm_eps", 1e-6),
        tied=flag(config, "tie_word_embeddings", False),
        n_kv=None if kv == heads else kv,
        d_head=None if d_head * heads == config["hidden_size"] else d_head,
        act=activation(config, "hidden_act", "silu"),
        norm="rms",
        qk_norm=kind == "qwen3",
        gated=True,
        biases=biases,
        rotary=d_head,
        **rope(config),
    )


def config_to_hf(cfg: Config) -> dict[str, Any]:
    """The hub's `config.json` of our config."""
    kind = "qwen3" if cfg.qk_norm else "qwen2" if cfg.biases == "q k v" else "llama"
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **sizes_to_hf(cfg, LLAMA_SIZES),
        "hidden_act": activation_to_hf(cfg),
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_size,
        "rms_norm_eps": cfg.eps,
        "tie_word_embeddings": cfg.tied,
        **rope_to_hf(cfg),
    }
    if kind != "qwen2":
        config["attention_bias"] = "q" in cfg.biases.split()
    return config | {"mlp_bias": "gate" in cfg.biases.split()} if kind == "llama" else config


def stored(cfg: Config) -> list[Stored]:
    """The hub's tensors, and our leaves in them."""
    bare = paths(cfg)
    found = whole({"wte.w": "embed_tokens.weight"})
    for i in range(cfg.n_layer):
        found += layers({f"blocks.{i}.{ours}": f"layers.{i}.{theirs}" for ours, theirs in LAYERS.items()}, bare)
    return found + layers({"ln_f": "norm"} | ({} if cfg.tied else {"head": "lm_head"}), bare)


LLAMA = Family(
    model_types=("llama", "qwen2", "qwen3"),
    prefix="model.",
    buffers=(".rotary_emb.inv_freq",),  # angles that old checkpoints carry
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    stored=stored,
)
