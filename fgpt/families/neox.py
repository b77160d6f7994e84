"""GPT-NeoX's and Pythia's tensors on the hub, and our tree: parallel branches on two norms, and q, k and v of each head
side by side in one product.
"""

from collections.abc import Mapping
from typing import Any

from fgpt.errors import InputError
from fgpt.families.hf_config import (
    LLAMA_SIZES,
    activation,
    activation_to_hf,
    flag,
    number,
    require_values,
    rope,
    rope_fields,
    rope_to_hf,
    sizes,
    sizes_to_hf,
)
from fgpt.families.mapping import Family, TensorMapping, layer_mappings, leaf_paths, one_to_one
from fgpt.model import Config

LAYERS = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.o": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def config_from_hf(config: Mapping[str, Any]) -> Config:
    """Our config of a Hugging Face `config.json`.

    Raises InputError if a field is missing, or has a value that is not supported.
    """
    shape = sizes(config, LLAMA_SIZES)
    require_values(config, {"attention_bias": True})
    d_head = config["hidden_size"] // config["num_attention_heads"]
    scaling = rope_fields(config)
    if "partial_rotary_factor" in scaling:
        fraction = number(scaling, "partial_rotary_factor", 0.25)
    else:
        fraction = number(config, "rotary_pct", 0.25)
    if not 0 < fraction <= 1:
        raise InputError(
            f"config.json: expected a fraction of each head for rotary_pct, above 0 up to 1, got {fraction}"
        )
    rotary = int(d_head * fraction)
    fields: dict[str, Any] = shape | rope(config, shape, rotary)
    return Config(
        **fields,
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        tie_word_embeddings=flag(config, "tie_word_embeddings", False),
        activation=activation(config, "hidden_act", "gelu"),
        parallel_residual=flag(config, "use_parallel_residual", True),
        rotary_dim=rotary,
    )


def config_to_hf(cfg: Config) -> dict[str, Any]:
    """The Hugging Face `config.json` of our config."""
    scaling = rope_to_hf(cfg)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **sizes_to_hf(cfg, LLAMA_SIZES),
        "hidden_act": activation_to_hf(cfg),
        "use_parallel_residual": cfg.parallel_residual,
        "rotary_pct": cfg.rotary_dim / cfg.head_size,
        "rotary_emb_base": scaling.pop("rope_theta"),
        **scaling,
        "layer_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_word_embeddings,
    }


def tensor_mappings(cfg: Config) -> list[TensorMapping]:
    """The tensors of Hugging Face's model, and our leaves in each."""
    bare = leaf_paths(cfg)
    mappings = one_to_one({"wte.w": "embed_in.weight"})
    for i in range(cfg.n_layer):
        mappings += layer_mappings({f"blocks.{i}.{ours}": f"layers.{i}.{hub}" for ours, hub in LAYERS.items()}, bare)
        for leaf, ending in (("w", "weight"), ("b", "bias")):
            parts = tuple(f"blocks.{i}.attn.{x}.{leaf}" for x in "qkv")
            mappings.append(TensorMapping(f"layers.{i}.attention.query_key_value.{ending}", parts, heads=cfg.n_head))
    return mappings + layer_mappings(
        {"ln_f": "final_layer_norm"} | ({} if cfg.tie_word_embeddings else {"head": "embed_out"}), bare
    )


NEOX = Family(
    model_types=("gpt_neox",),
    prefix="gpt_neox.",
    buffers=(
        ".attention.bias",
        ".attention.masked_bias",
        ".rotary_emb.inv_freq",
    ),  # causal masks and angles that old checkpoints carry
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensor_mappings=tensor_mappings,
)
