"""Models in GGUF files, as llama.cpp's tools write them: tensors by their hub names, as the hub has them.

llama.cpp reorders some tensors for its kernels, each architecture's in its own way; here Hugging Face's order is
restored. The metadata of a file become a Hugging Face `config.json`. A key or a tensor that would change the model, and
has no counterpart there, is refused: a model that is almost read answers almost sensibly.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from fgpt import families
from fgpt.errors import InputError
from fgpt.families import mapping
from fgpt.io.gguf_header import FLOAT_TYPES, Container, Entry, read_header, read_tensor
from fgpt.kernels.rotary import RopeScaling
from fgpt.model import Config as ModelConfig

Config = dict[str, Any]


class Order(NamedTuple):
    """How the elements of a tensor lie in the file, and on the hub: what makes each of the other."""

    to_hub: Callable[[Tensor], Tensor]
    to_file: Callable[[Tensor], Tensor]
    is_transposed: bool = False


@dataclass(frozen=True)
class Source:
    """Where a tensor of Hugging Face's comes from: its name in the file, its shape on the hub, and its order if that
    differs.
    """

    name: str
    shape: tuple[int, ...]
    order: Order | None = None

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape that the file must have."""
        return self.shape[::-1] if self.order and self.order.is_transposed else self.shape


@dataclass(frozen=True)
class GGUF:
    """A GGUF file whose header has been read and checked: reading a tensor can only fail if the file changes."""

    path: Path
    fields: Mapping[str, Any]
    """All metadata by its key in the file; lists are lists."""
    config: Config
    """A hub's `config.json`."""
    sources: Mapping[str, Source]
    entries: Mapping[str, Entry]

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter tensor by its hub name, with the hub's shape."""
        return {name: source.shape for name, source in self.sources.items()}

    def read(self, name: str) -> Tensor:
        """One tensor by its hub name, in memory of its own: fp32, or fp16 and bf16 if the file has those.

        Raises InputError for a name that is not in `sizes`, or if the file has changed.
        """
        if name not in self.sources:
            raise InputError(
                f"{self.path}: no tensor named {name}; expected a hub name such as {next(iter(self.sources))}"
            )
        source = self.sources[name]
        x = read_tensor(self.path, self.entries[source.name])
        return source.order.to_hub(x) if source.order else x


def open_gguf(path: Path) -> GGUF:
    """The model of a GGUF file; no tensor is read yet except Llama 3's RoPE factors.

    Raises InputError for a file that is missing, no GGUF, truncated, of an unknown architecture, or whose metadata and
    tensors are not those of one model.
    """
    file = read_header(path)
    name = file.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(f"{path}: general.architecture is {name!r}; expected one of {', '.join(ARCHITECTURES)}")
    config = ARCHITECTURES[name](_Metadata(file, name))
    try:
        sources = sources_of(config, name)
    except InputError as err:
        raise InputError(f"{path}: {err}") from None
    _check(file, sources, name)
    for key in ("bos", "eos"):
        if isinstance(token := file.fields.get(f"tokenizer.ggml.{key}_token_id"), int):
            config[f"{key}_token_id"] = token
    return GGUF(path, file.fields, config | {"torch_dtype": _dtype(file)}, sources, file.entries)


def sources_of(config: Config, arch: str) -> dict[str, Source]:
    """Each tensor by its hub name: names in the file by gguf's own table, shapes by the family's.

    Raises InputError for a config that is none of the family.
    """
    import gguf  # here: it is an extra, and opening the file has asked for it

    family = families.family_from_config(config)
    cfg = family.config_from_hf(config)
    known = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], cfg.n_layer)
    sources: dict[str, Source] = {}
    for name, shape in mapping.tensor_shapes(cfg, family).items():
        hub = name if mapping.is_head(name) else family.prefix + name
        file_name = names.get_name(hub, (".weight", ".bias"))
        assert file_name is not None
        sources[hub] = Source(file_name, shape, _order(hub, arch, cfg))
    return sources


def _order(hub: str, arch: str, cfg: ModelConfig) -> Order | None:
    """How a tensor lies in the file; None if it lies there as on the hub."""
    if arch == "llama" and ".q_proj." in hub:
        return _rope_order(cfg.n_head)
    if arch == "llama" and ".k_proj." in hub:
        return _rope_order(cfg.kv_heads)
    if arch == "gptneox" and ".query_key_value." in hub:
        return Order(partial(_interleave_qkv, heads=cfg.n_head), partial(_separate_qkv, heads=cfg.n_head))
    if arch == "gpt2" and re.search(r"\.c_(attn|proj|fc)\.weight$", hub):  # Hugging Face's are [in, out]
        return Order(_transpose, _transpose, is_transposed=True)
    return None


def _rope_order(heads: int) -> Order:
    return Order(partial(_unpermute_rope, heads=heads), partial(_permute_rope, heads=heads))


def _check(file: Container, sources: Mapping[str, Source], arch: str) -> None:
    """Raises InputError if the tensors are not just those that the metadata speak of."""
    expected = {source.name: (hub, source.file_shape) for hub, source in sources.items()}
    for name, (hub, shape) in expected.items():
        if name not in file.entries:
            raise InputError(f"{file.path}: tensor {name} ({hub}) is missing; expected shape {list(shape)}")
        if file.entries[name].shape != shape:
            got = list(file.entries[name].shape)
            raise InputError(f"{file.path}: tensor {name} ({hub}) has shape {got}; its metadata say {list(shape)}")
    used = {ROPE} if arch == "llama" else set()  # it has become part of the config
    if surplus := sorted(file.entries.keys() - expected.keys() - used):
        raise InputError(
            f"{file.path}: tensor {surplus[0]} has no place in {arch} as its metadata describe it; expected none but "
            "its own, so this may be a variant that is not read here"
        )


def _dtype(file: Container) -> str:
    """The dtype of most elements."""
    counts: dict[torch.dtype, int] = {}
    for entry in file.entries.values():
        dtype = FLOAT_TYPES.get(entry.kind, torch.float32)
        counts[dtype] = counts.get(dtype, 0) + math.prod(entry.shape)
    return str(max(counts, key=lambda dtype: counts[dtype])).removeprefix("torch.")


# ----------------------------------------------------------------------------------------------------- what a file says


class _Metadata:
    """An architecture's metadata, key by key, each checked; and in the end, whether any was left unread."""

    def __init__(self, file: Container, arch: str):
        self.file, self.arch, self.asked = file, arch, set[str]()

    def error(self, key: str, expected: str) -> InputError:
        key = f"{self.arch}.{key}"
        got = repr(self.file.fields[key])[:80] if key in self.file.fields else "nothing"
        return InputError(f"{self.file.path}: {key}: expected {expected}, got {got}")

    def get(self, key: str) -> Any:
        self.asked.add(f"{self.arch}.{key}")
        return self.file.fields.get(f"{self.arch}.{key}")

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self.error(key, "a positive integer")
        return value

    def positive_float(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(key, "a positive number")
        return float(str(np.float32(value)))  # 1e-05, as its author wrote it, and not 9.999999747378752e-06

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise self.error(key, "true or false")
        return default if value is None else value

    def has(self, tensor: str) -> bool:
        return tensor in self.file.entries

    def n_layer(self) -> int:
        layers = self.positive_int("block_count")
        if layers > len(self.file.entries):
            raise self.error("block_count", f"at most the {len(self.file.entries)} tensors of the file")
        return layers

    def rows(self, tensor: str) -> int:
        if not self.has(tensor):
            raise InputError(f"{self.file.path}: tensor {tensor} is missing; expected the model's table of tokens")
        return self.file.entries[tensor].shape[0]

    def vocab_size(self) -> int:
        rows = self.rows("token_embd.weight")
        if self.positive_int("vocab_size", rows) != rows:
            raise self.error("vocab_size", f"{rows}, the rows of token_embd.weight")
        return rows

    def refuse_unread(self, **neutral: Any) -> None:
        """Raises InputError for a key of the architecture that was not asked for and says more than nothing."""
        harmless = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True} | neutral
        for key, value in self.file.fields.items():
            short = key.removeprefix(f"{self.arch}.")
            if short != key and key not in self.asked and (short not in harmless or harmless[short] != value):
                raise InputError(
                    f"{self.file.path}: {key} is {repr(value)[:80]}, which is not read here: a variant of {self.arch}"
                )


# --------------------------------------------------------------------------------------- Llama and the Qwens after it


def _llama(meta: _Metadata) -> Config:
    """Llama, and what shares its architecture: SmolLM2, TinyLlama, Llama 3, Mistral without its window."""
    config = _llama_config(meta)
    config |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "mlp_bias": meta.has("blk.0.ffn_gate.bias"),
    }
    config |= {"attention_bias": meta.has("blk.0.attn_q.bias")}
    if meta.has(ROPE):
        if config["rope_scaling"]:
            raise InputError(f"{meta.file.path}: expected tensor {ROPE} or {meta.arch}.rope.scaling.type, got both")
        config["rope_scaling"] = _llama3_rope(meta.file, config)
    return config


def _qwen2(meta: _Metadata) -> Config:
    config = _llama_config(meta) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    return config | {"use_sliding_window": False}


def _qwen3(meta: _Metadata) -> Config:
    config = _llama_config(meta) | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    return config | {"use_sliding_window": False, "attention_bias": meta.has("blk.0.attn_q.bias")}


def _llama_config(meta: _Metadata) -> Config:
    width, heads, context = (
        meta.positive_int("embedding_length"),
        meta.positive_int("attention.head_count"),
        meta.positive_int("context_length"),
    )
    kv_heads = meta.positive_int("attention.head_count_kv", heads)
    each = meta.positive_int("attention.key_length", max(1, width // heads))
    if meta.get("attention.key_length") is None and width % heads:
        raise meta.error("attention.head_count", f"a divisor of the width {width}")
    if heads % kv_heads:
        raise meta.error("attention.head_count_kv", f"a divisor of the {heads} heads")
    if meta.positive_int("attention.value_length", each) != each:
        raise meta.error("attention.value_length", f"{each}, as the keys")
    if meta.positive_int("rope.dimension_count", each) != each or each % 2:
        raise meta.error("rope.dimension_count", f"{each}, an even number and the whole head")
    if meta.positive_int("attention.sliding_window", context) < context:
        raise meta.error("attention.sliding_window", f"no window, or at least the context of {context}")
    config = {
        "hidden_size": width,
        "num_hidden_layers": meta.n_layer(),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": each,
        "intermediate_size": meta.positive_int("feed_forward_length"),
        "vocab_size": meta.vocab_size(),
        "max_position_embeddings": context,
        "rms_norm_eps": meta.positive_float("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.positive_float("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(meta),
        "hidden_act": "silu",
        "tie_word_embeddings": not meta.has("output.weight"),
    }
    meta.get("rope.scaling.finetuned")  # whether the scale was trained with changes no number
    meta.refuse_unread(**{"rope.scaling.attn_factor": 1.0})
    return config


def _rope_scaling(meta: _Metadata) -> dict[str, Any] | None:
    kind = meta.get("rope.scaling.type")
    if kind in (None, "none"):
        if meta.get("rope.scaling.factor") not in (None, 0.0, 1.0):
            raise meta.error("rope.scaling.type", "linear or yarn beside a factor")
        meta.get("rope.scaling.original_context_length")
        return None
    if kind not in ("linear", "yarn"):
        raise meta.error("rope.scaling.type", "none, linear or yarn")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": meta.positive_float("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = meta.positive_int("rope.scaling.original_context_length")
    else:
        meta.get("rope.scaling.original_context_length")  # a linear scale does not need it
    return scaling


ROPE = "rope_freqs.weight"
"""By what Llama 3 divides each frequency of its rope: the file has the quotients, the hub what they are made from."""


def _llama3_rope(file: Container, config: Config) -> dict[str, Any] | None:
    """The hub's scaling that gives the file's factors, one for each pair of a head.

    Llama 3's own: frequencies of more than `high` turns within the `original` context stay, those of fewer than `low`
    are divided by `factor`, those between by what interpolates. Only original / low and original / high count, so of
    the three we look for the published ones alone.

    Raises InputError for factors that these do not give.
    """
    entry, pairs = file.entries[ROPE], config["head_dim"] // 2
    if entry.shape != (pairs,) or entry.kind != "F32":
        raise InputError(f"{file.path}: tensor {ROPE} is {entry.kind} {list(entry.shape)}; expected F32 [{pairs}]")
    got = read_tensor(file.path, entry).double()
    factor, original, low, high = round(got.max().item(), 4), 8192, 1.0, 4.0
    if torch.equal(got, torch.ones_like(got)):
        return None
    expected = rope_factors((factor, low, high, original), config["rope_theta"], pairs)
    if not torch.allclose(got, expected, rtol=1e-4, atol=0):
        raise InputError(
            f"{file.path}: tensor {ROPE}: expected Llama 3's factors (original context {original}, {low:g} to {high:g} "
            f"turns), got others, up to {factor}: the file does not say how they were made; use the model's hub folder"
        )
    turns = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor} | turns


def rope_factors(scaling: RopeScaling, theta: float, pairs: int) -> Float64[Tensor, "pair"]:
    """By what Llama 3 divides the frequency of each pair of a head.

    Args:
        scaling: (factor, low, high, context), see `kernels.rotary`.
        theta: The base of the angles.
        pairs: Half the size of a head.
    """
    factor, low, high, context = scaling
    turns = context * theta ** (-torch.arange(pairs).double() / pairs) / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)  # of the frequency as it was
    return 1 / ((1 - share) / factor + share)


def _unpermute_rope(x: Tensor, heads: int) -> Tensor:
    """Rows of each head in Hugging Face's order for RoPE (pairs i, i + d/2), from llama.cpp's (pairs 2i, 2i + 1)."""
    pairs = x.shape[0] // heads // 2
    return x.unflatten(0, (heads, pairs, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _permute_rope(x: Tensor, heads: int) -> Tensor:
    """The inverse of `_unpermute_rope`."""
    pairs = x.shape[0] // heads // 2
    return x.unflatten(0, (heads, 2, pairs)).transpose(1, 2).flatten(0, 2).contiguous()


# ------------------------------------------------------------------------------------------------------ GPT-2, GPT-NeoX


def _gpt2(meta: _Metadata) -> Config:
    width, layers, vocab = meta.positive_int("embedding_length"), meta.n_layer(), meta.vocab_size()
    inner, context = meta.positive_int("feed_forward_length", 4 * width), meta.positive_int("context_length")
    config: Config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": width,
        "n_layer": layers,
        "n_head": meta.positive_int("attention.head_count"),
        "n_inner": inner,
        "n_positions": context,
        "vocab_size": vocab,
        "layer_norm_epsilon": meta.positive_float("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": not meta.has("output.weight"),
    }
    if width % config["n_head"]:
        raise meta.error("attention.head_count", f"a divisor of the width {width}")
    meta.positive_int("attention.head_count_kv", config["n_head"])
    meta.refuse_unread(**{"attention.head_count_kv": config["n_head"]})
    return config


def _gptneox(meta: _Metadata) -> Config:
    """GPT-NeoX and Pythia. The activation is not in the file; it is the architecture's, GELU by the error function."""
    width, layers, vocab = meta.positive_int("embedding_length"), meta.n_layer(), meta.vocab_size()
    heads, inner = meta.positive_int("attention.head_count"), meta.positive_int("feed_forward_length")
    if width % heads:
        raise meta.error("attention.head_count", f"a divisor of the width {width}")
    rotary = meta.positive_int("rope.dimension_count", width // heads)
    if rotary > width // heads or rotary % 2:
        raise meta.error("rope.dimension_count", f"an even number up to the head's {width // heads}")
    config: Config = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": meta.positive_int("context_length"),
        "layer_norm_eps": meta.positive_float("attention.layer_norm_epsilon"),
        "rotary_pct": rotary / (width // heads),
        "rotary_emb_base": meta.positive_float("rope.freq_base", 10000.0),
        "rope_scaling": None,
        "use_parallel_residual": meta.flag("use_parallel_residual", True),
        "attention_bias": True,
        "hidden_act": "gelu",
        "tie_word_embeddings": not meta.has("output.weight"),
    }
    config["rope_theta"] = config["rotary_emb_base"]
    meta.refuse_unread(**{"attention.head_count_kv": heads, "rope.scaling.type": "none"})
    return config


def _transpose(x: Tensor) -> Tensor:
    return x.T.contiguous()


def _interleave_qkv(x: Tensor, heads: int) -> Tensor:
    """q, k and v of each head together, as the hub has them, from all q, all k, all v."""
    return x.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def _separate_qkv(x: Tensor, heads: int) -> Tensor:
    """The inverse of `_interleave_qkv`."""
    return x.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()


ARCHITECTURES: dict[str, Callable[[_Metadata], Config]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "gptneox": _gptneox,
}
