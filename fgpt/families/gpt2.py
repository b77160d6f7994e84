"""GPT-2's tensors on the hub, and our tree.

The hub keeps OpenAI's layout: every block matrix is a Conv1D, [in, out], and q, k and v are one matrix, c_attn. Here
weights are [out, in] and split. This is the one place that knows.
"""

from collections.abc import Mapping
from typing import Any

from fgpt.families.hf_config import activation, activation_to_hf, flag, number, optional_size, sizes, sizes_to_hf
from fgpt.families.mapping import Family, TensorMapping, layer_mappings, leaf_paths, one_to_one
from fgpt.model import Config

SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "d_model",
    "n_positions": "n_ctx",
    "vocab_size": "vocab_size",
}
"""The hub's names of sizes, and ours."""


def common(config: Mapping[str, Any], names: Mapping[str, str] = SIZES) -> dict[str, Any]:
    """What GPT-2's config says, and GPT-J's alike, by our names. Raises InputError as `sizes` and `activation` do."""
    return sizes(config, names) | {
        "d_mlp": optional_size(config, "n_inner", 4 * config["n_embd"]),
        "norm_eps": number(config, "layer_norm_epsilon", 1e-5),
        "activation": activation(config, "activation_function", "gelu_new"),
    }


def common_to_hf(cfg: Config, names: Mapping[str, str] = SIZES) -> dict[str, Any]:
    """The inverse of `common`."""
    return sizes_to_hf(cfg, names) | {
        "n_inner": None if cfg.d_mlp == 4 * cfg.d_model else cfg.d_mlp,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": activation_to_hf(cfg),
        "tie_word_embeddings": cfg.tie_word_embeddings,
    }


def config_from_hf(config: Mapping[str, Any]) -> Config:
    """Our config of a Hugging Face `config.json`.

    A field of our own, `bias`, is false for a model that has no biases. transformers knows no such GPT-2: it says that
    they are missing, makes them zero, and so computes the same.

    Raises InputError if a field is missing or asks for an architecture that GPT-2 proper does not have.
    """
    fields = common(config)
    flag(config, "reorder_and_upcast_attn", False)  # a way to compute the same: here scores are in fp32 anyway
    biases = Config.biases if flag(config, "bias", True) else frozenset()
    return Config(
        **fields,
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
        biases=biases,
        scale_attn_weights=flag(config, "scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=flag(config, "scale_attn_by_inverse_layer_idx", False),
    )


def config_to_hf(cfg: Config) -> dict[str, Any]:
    """The Hugging Face `config.json` of our config."""
    ends = {"bos_token_id": cfg.vocab_size - 1, "eos_token_id": cfg.vocab_size - 1}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"} | common_to_hf(cfg) | ends
    if not cfg.biases:
        config["bias"] = False
    if not cfg.scale_attn_weights:
        config["scale_attn_weights"] = False
    if cfg.scale_attn_by_inverse_layer_idx:
        config["scale_attn_by_inverse_layer_idx"] = True
    return config


def tensor_mappings(cfg: Config) -> list[TensorMapping]:
    """The tensors of Hugging Face's model, and our leaves in each."""
    bare = leaf_paths(cfg)
    mappings = one_to_one({"wte.w": "wte.weight", "wpe.w": "wpe.weight"})
    for i in range(cfg.n_layer):
        ours, hub = f"blocks.{i}", f"h.{i}"
        mappings += layer_mappings({f"{ours}.{norm}": f"{hub}.{norm}" for norm in ("ln_1", "ln_2")}, bare)
        for modules, name in (
            (("attn.q", "attn.k", "attn.v"), "attn.c_attn"),
            (("attn.o",), "attn.c_proj"),
            (("mlp.up",), "mlp.c_fc"),
            (("mlp.down",), "mlp.c_proj"),
        ):
            weights, biases = (tuple(f"{ours}.{x}.{leaf}" for x in modules) for leaf in ("w", "b"))
            mappings.append(TensorMapping(f"{hub}.{name}.weight", weights, transposed=True))
            mappings += [TensorMapping(f"{hub}.{name}.bias", biases)] if biases[0] in bare else []
    return mappings + layer_mappings({"ln_f": "ln_f"} | ({} if cfg.tie_word_embeddings else {"head": "lm_head"}), bare)


GPT2 = Family(
    model_types=("gpt2",),
    prefix="transformer.",
    buffers=(".attn.bias", ".attn.masked_bias"),  # causal masks that old checkpoints carry
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensor_mappings=tensor_mappings,
)
