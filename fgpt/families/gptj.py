"""GPT-J's tensors on the hub, and our tree: parallel branches on one norm, 64 interleaved rotary components, and an
output layer of its own that has a bias.
"""

from collections.abc import Mapping
from typing import Any

from fgpt.families.names import Family, Stored, activation, layers, only, paths, whole, whole_numbers
from fgpt.model import Config

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
    """Our config of a hub `config.json`. Raises InputError where a field is missing, or one that we do not compute."""
    whole_numbers(config, ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "rotary_dim"))
    only(config, {"tie_word_embeddings": False})
    return Config(
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        d_model=config["n_embd"],
        context=config["n_positions"],
        vocab=config["vocab_size"],
        d_mlp=config.get("n_inner") or 4 * config["n_embd"],
        eps=config.get("layer_norm_epsilon", 1e-5),
        tied=False,
        act=activation(config, "activation_function", "gelu_new"),
        parallel=True,
        norms=1,
        biases="up down norm head",
        rotary=config["rotary_dim"],
        interleaved=True,
    )


def config_to_hf(cfg: Config) -> dict[str, Any]:
    """The hub's `config.json` of our config."""
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "activation_function": {"gelu_tanh": "gelu_new"}.get(cfg.act, cfg.act),
        "vocab_size": cfg.vocab,
        "n_positions": cfg.context,
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_inner": None if cfg.d_mlp == 4 * cfg.d_model else cfg.d_mlp,
        "rotary_dim": cfg.rotary,
        "layer_norm_epsilon": cfg.eps,
        "tie_word_embeddings": False,
    }


def stored(cfg: Config) -> list[Stored]:
    """The hub's tensors, and our leaves in them."""
    bare = paths(cfg)
    found = whole({"wte.w": "wte.weight"})
    for i in range(cfg.n_layer):
        found += layers({f"blocks.{i}.{ours}": f"h.{i}.{theirs}" for ours, theirs in LAYERS.items()}, bare)
    return found + layers({"ln_f": "ln_f", "head": "lm_head"}, bare)


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
    stored=stored,
)
