"""GPT-J's tensors on the hub, and our tree: parallel branches on one norm, 64 interleaved rotary components, and an
output layer of its own that has a bias.
"""

from collections.abc import Mapping
from typing import Any

from fgpt.families import gpt2
from fgpt.families.hf_config import require_values
from fgpt.families.mapping import Family, TensorMapping, layer_mappings, leaf_paths, one_to_one
from fgpt.model import Config

SIZES = gpt2.SIZES | {"rotary_dim": "rotary_dim"}
LAYERS = {
    "ln_1": "ln_1",
    "attn.q": "attn.q_proj",
    "attn.k": "attn.k_proj",
    "attn.v": "attn.v_proj",
    "attn.o": "attn.out_proj",
    "mlp.up": "mlp.fc_in",
    "mlp.down": "mlp.fc_out",
}


def config_from_hf(config: Mapping[str, Any]) -> Config:
    """Our config of a Hugging Face `config.json`.

    Raises InputError if a field is missing, or has a value that is not supported.
    """
    fields = gpt2.common(config, SIZES)
    require_values(config, {"tie_word_embeddings": False})
    return Config(
        **fields,
        tie_word_embeddings=False,
        parallel_residual=True,
        n_norms=1,
        biases=frozenset({"up", "down", "norm", "head"}),
        interleaved=True,
    )


def config_to_hf(cfg: Config) -> dict[str, Any]:
    """The Hugging Face `config.json` of our config."""
    return {"architectures": ["GPTJForCausalLM"], "model_type": "gptj"} | gpt2.common_to_hf(cfg, SIZES)


def tensor_mappings(cfg: Config) -> list[TensorMapping]:
    """The tensors of Hugging Face's model, and our leaves in each."""
    bare = leaf_paths(cfg)
    mappings = one_to_one({"wte.w": "wte.weight"})
    for i in range(cfg.n_layer):
        mappings += layer_mappings({f"blocks.{i}.{ours}": f"h.{i}.{hub}" for ours, hub in LAYERS.items()}, bare)
    return mappings + layer_mappings({"ln_f": "ln_f"} | ({} if cfg.tie_word_embeddings else {"head": "lm_head"}), bare)


GPTJ = Family(
    model_types=("gptj",),
    prefix="transformer.",
    buffers=(
        ".attn.bias",
        ".attn.masked_bias",
        ".attn.embed_positions",
    ),  # causal masks and angles that old checkpoints carry
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensor_mappings=tensor_mappings,
)
