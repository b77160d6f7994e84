"""Models of the architectures that GGUF files have, and such files of them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

WIDE: dict[str, Any] = {"vocab_size": 48, "max_position_embeddings": 40, "hidden_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
MODELS: dict[str, tuple[str, PreTrainedConfig]] = {
    "llama": ("llama", LlamaConfig(**WIDE, **HEADS, tie_word_embeddings=True)),
    "llama, no groups, untied": ("llama", LlamaConfig(**WIDE, **HEADS | {"num_key_value_heads": 4})),
    "llama, biases, wide heads": (
        "llama",
        LlamaConfig(**WIDE, **HEADS, head_dim=32, attention_bias=True, mlp_bias=True),
    ),
    "qwen2": ("qwen2", Qwen2Config(**WIDE, **HEADS, tie_word_embeddings=True, rope_theta=1e6)),
    "qwen3": ("qwen3", Qwen3Config(**WIDE, **HEADS, head_dim=32, rms_norm_eps=1e-6)),
    "gpt2": ("gpt2", GPT2Config(vocab_size=48, n_positions=40, n_embd=64, n_layer=2, n_head=4)),
    "gptneox": (
        "gptneox",
        GPTNeoXConfig(**WIDE, num_attention_heads=4, intermediate_size=96, rotary_pct=0.5, tie_word_embeddings=False),
    ),
}


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Random weights in every place, norms and biases too."""
    model = AutoModelForCausalLM.from_config(config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    return model


def gguf_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a GGUF file has of a model: its parameters by hub name, a tied head once."""
    renamed = {"lm_head.weight": "embed_out.weight"} if model.config.model_type == "gpt_neox" else {}
    return {renamed.get(name, name): p.detach() for name, p in model.named_parameters()}


def in_ggml_order(arch: str, name: str, x: Tensor, config: Any) -> Tensor:
    """The order that llama.cpp's converters give a tensor, written out row by row."""
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        each = x.shape[0] // heads
        rows = [h * each + half * each // 2 + i for h in range(heads) for i in range(each // 2) for half in (0, 1)]
        return x[rows]
    if arch == "gpt2" and x.ndim == 2 and ".h." in name:
        return x.T
    if arch == "gptneox" and "query_key_value" in name:
        each = config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads
        return x[[(3 * h + part) * each + i for part in range(3) for h in range(heads) for i in range(each)]]
    return x


def quantized_array(x: Tensor, kind: Kind) -> np.ndarray:
    """As the file has it: vectors stay fp32, as llama.cpp keeps them."""
    return quantize(x.contiguous().numpy(), kind if x.ndim > 1 else Kind.F32)


def write_gguf(
    path: Path, arch: str, model: PreTrainedModel, kind: Kind = Kind.F32, **edit: Any
) -> dict[str, np.ndarray]:
    """A GGUF file of `made`, with the keys that llama.cpp's converter writes; `edit` is for metadata and tensors.
    Returns what is stored, by name.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(str(path), arch)
    values = gguf_metadata(arch, config) | edit.get("fields", {})
    for key, value in values.items():
        if value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    for hub, x in gguf_tensors(model).items():
        name = names.get_name(hub, try_suffixes=(".weight", ".bias"))
        assert name, hub
        found[name] = quantized_array(in_ggml_order(arch, hub, x, config), kind)
    found |= edit.get("tensors", {})
    for name in edit.get("without", ()):
        del found[name]
    for name, data in found.items():
        raw = kind if data.dtype == np.uint8 else None
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def gguf_metadata(arch: str, config: Any) -> dict[str, Any]:
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
    }
    if arch in ("llama", "qwen2", "qwen3"):
        each = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
            "rope.dimension_count": each,
            "attention.key_length": each,
            "attention.value_length": each,
            "vocab_size": config.vocab_size,
        }
    if arch == "gptneox":
        found |= {
            "attention.layer_norm_epsilon": config.layer_norm_eps,
            "rope.dimension_count": int(0.5 * config.hidden_size // config.num_attention_heads),
            "use_parallel_residual": config.use_parallel_residual,
        }
    if arch == "gpt2":
        found |= {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
    # transformers counts the tokens where vocab_size is missing
    tokens = [f"t{i}" for i in range(config.vocab_size)]
    return {f"{arch}.{key}": value for key, value in found.items()} | {"tokenizer.ggml.tokens": tokens}
