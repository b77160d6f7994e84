"""transformers' models of every family, tiny and with random weights, and ours of the same files."""

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import fgpt

COMMON = {"vocab_size": 31, "bos_token_id": None, "eos_token_id": None}
GPTJ = COMMON | {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 24, "rotary_dim": 8}
NEOX = COMMON | {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
}
LLAMA = NEOX | {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MISTRAL = LLAMA | {"sliding_window": 5}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 6}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("GPTJ", GPTJ),
    "gptj, all rotated": ("GPTJ", GPTJ | {"rotary_dim": 16, "n_inner": 24, "layer_norm_epsilon": 1e-2}),
    "neox": ("GPTNeoX", NEOX),
    "neox, one after the other": ("GPTNeoX", NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "neox, tied": (
        "GPTNeoX",
        NEOX
        | {
            "rope_parameters": {"rope_theta": 77.0, "rope_type": "default", "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
    "llama": ("Llama", LLAMA),
    "llama, tied": ("Llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama, one kv head": ("Llama", LLAMA | {"num_key_value_heads": 1, "head_dim": 6}),
    "llama, biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("Llama", LLAMA | {"rope_parameters": LLAMA_3}),
    "llama, linear": ("Llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2, tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
    "mistral": ("Mistral", MISTRAL),
    "mistral, wider than its context": ("Mistral", MISTRAL | {"sliding_window": 4096, "head_dim": 12}),
    "qwen2, windows from the second layer on": (
        "Qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3, a window in one layer": (
        "Qwen3",
        LLAMA
        | {"use_sliding_window": True, "sliding_window": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama, yarn": ("Llama", LLAMA | {"rope_parameters": YARN}),
    "qwen2, yarn, every field": (
        "Qwen2",
        LLAMA
        | {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 8, "beta_slow": 0.5, "truncate": False}},
    ),
    "mistral, yarn, two mscale": (
        "Mistral",
        MISTRAL | {"head_dim": 16, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 2}},
    ),
    "neox, yarn": ("GPTNeoX", NEOX | {"rope_parameters": YARN | {"partial_rotary_factor": 0.5, "rope_theta": 77.0}}),
}


def hf_model(name: str, seed: int = 0, **overrides: Any) -> Any:
    """transformers' model with random weights in every place: biases and norms too, ten times the usual spread."""
    kind, fields = VARIANTS[name]
    fields = copy.deepcopy(fields | overrides)  # transformers writes into what it is given
    config = getattr(transformers, f"{kind}Config")(**fields, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.copy_(
                0.2 * torch.randn(p.shape, generator=rng) + ("norm" in path or ".ln_" in path) * path.endswith("weight")
            )
    return model


def save_and_load(model: Any, **options: Any) -> fgpt.GPT:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return fgpt.load(folder, **options)


def write_hf_folder(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A model's folder, its config changed; None takes a field away."""
    hf_model(name).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: x for k, x in config.items() if x is not None}))
    return folder


def write_shard_index(folder: Path, where: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
