"""GGUF files of models, as llama.cpp's converter writes them: tensors by llama.cpp's names and in its order, the config
and the tokenizer as metadata.

What cannot be said in such a file is refused. Before any tensor is written, the header is read as `gguf.open_gguf`
reads it: its config has to be the model's. What llama.cpp computes by itself is part of that config, such as GPT-2's
activation, Llama's without a window.

Types: matrices as asked for; vectors, and the table of positions, in fp32, as llama.cpp has them. Rows that are no
multiple of a block stay in fp16. With q4_0 the head, and a table that is the head, are Q8_0: rounded to 4 bits, they
would cost the most.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgpt import families
from fgpt._typing import StrPath
from fgpt.classification_head import num_classes
from fgpt.errors import InputError, check_choice
from fgpt.extras import require_extra
from fgpt.families import mapping
from fgpt.io import models
from fgpt.io.files import atomic_file
from fgpt.io.gguf import ROPE, Source, open_gguf, rope_factors, sources_of
from fgpt.kernels.rotary import YarnScaling
from fgpt.layers import has_quantized
from fgpt.model import GPT, Config
from fgpt.tokenizers.gguf_tokenizer import to_gguf
from fgpt.tokenizers.tokenizer_files import Tokenizer

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
ARCHITECTURES = {"gpt2": "gpt2", "gpt_neox": "gptneox", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's names by model_type. It has no GPT-J, and no Mistral whose window is shorter than its context."""
FILE_TYPES: dict[GGUFType, str] = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
"""The names of `general.file_type` in gguf.LlamaFileType."""
BLOCK = 32
"""Elements of a block of Q8_0 and Q4_0."""
HEAD, TABLE, POSITIONS = "output.weight", "token_embd.weight", "position_embd.weight"


class FileTensor(NamedTuple):
    """A tensor of the file: its type, and what reads it, in the file's order."""

    kind: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def save_gguf(
    params: GPT,
    path: StrPath,
    like: StrPath | Tokenizer | None = None,
    type: GGUFType = "f16",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write `params` as a GGUF file, which llama.cpp and what is built on it run, and `load` reads.

    GPT-2, GPT-NeoX, Llama, Qwen 2 and 3. One tensor at a time is in memory beside the model.

    Args:
        params: The model, plain: without adapters and not quantized (`merge` them first).
        path: The file, replaced as a whole.
        like: The tokenizer, or a model that has it; without one the file has none, and runs on tokens alone.
        type: Of the matrices: "f16", "f32", "bf16", or "q8_0" and "q4_0", blocks of 32 in 8 and 4 bits with a scale.
        metadata: Further keys, such as {"general.name": "mine"}, or "tokenizer.chat_template" in place of the
            tokenizer's.

    Raises:
        InputError: for a model that llama.cpp has no architecture for, that is adapted, quantized or a classifier; for
            a tokenizer that a GGUF file cannot hold; for elements beyond fp16's range; and without the package gguf.

    Source: github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py.

    >>> import tempfile, torch, fgpt
    >>> params = fgpt.load("nano")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fgpt.save_gguf(params, f"{folder}/nano.gguf", like="nano")
    ...     stored = fgpt.load(f"{folder}/nano.gguf")
    >>> bool(torch.equal(stored.wte.w, params.wte.w.half().float()))
    True
    """
    require_extra("gguf", "GGUF files", "gguf")
    check_choice("type", type, GGUFType)
    if (classes := num_classes(params)) is not None:
        raise InputError(f"a classifier of {classes} classes has no GGUF file: expected a language model")
    if has_quantized(params):
        raise InputError("the model is quantized: merge(params, base='dequantized') gives one to write as a GGUF file")
    arch, cfg = architecture(params.cfg)
    tokenizer = models.tokenizer(like) if isinstance(like, str | os.PathLike) else like
    fields = {"general.architecture": arch, "general.type": "model"} | config_fields(arch, cfg)
    fields |= {"tokenizer.ggml.model": "none"} if tokenizer is None else to_gguf(tokenizer, cfg.vocab_size)
    fields |= file_type_fields(type) | dict(metadata or {})
    write_gguf_file(Path(path), fields, _tensors(params, arch, cfg, type), lambda file: _check_config(file, cfg))


def architecture(cfg: Config) -> tuple[str, Config]:
    """llama.cpp's name of the architecture of a model, and the config that its file has.

    Raises InputError if llama.cpp has none.
    """
    if cfg.sliding_window is not None and cfg.sliding_window >= cfg.n_ctx:  # it never takes effect
        cfg = dataclasses.replace(cfg, sliding_window=None, full_layers=())
    model_type = families.family_of(cfg).config_to_hf(cfg)["model_type"]
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"GGUF files are written of {', '.join(ARCHITECTURES)}: llama.cpp has nothing that computes this "
            f"{model_type}; save(params, folder) writes it for transformers"
        )
    if model_type == "gpt2":  # llama.cpp's always has biases
        cfg = dataclasses.replace(cfg, biases=Config.biases)
    if model_type == "gpt_neox":  # and this one a head of its own
        cfg = dataclasses.replace(cfg, tie_word_embeddings=False)
    return ARCHITECTURES[model_type], cfg


# ------------------------------------------------------------------------------------------------------------- metadata


def config_fields(arch: str, cfg: Config) -> dict[str, Any]:
    """The metadata of a model, by key."""
    is_llama = arch in ("llama", "qwen2", "qwen3")
    norm = "attention.layer_norm_rms_epsilon" if is_llama else "attention.layer_norm_epsilon"
    fields: dict[str, Any] = {
        "block_count": cfg.n_layer,
        "context_length": cfg.n_ctx,
        "embedding_length": cfg.d_model,
        "feed_forward_length": cfg.d_mlp,
        "attention.head_count": cfg.n_head,
        "vocab_size": cfg.vocab_size,
        norm: cfg.norm_eps,
    }
    if cfg.rotary_dim:
        fields |= {"rope.dimension_count": cfg.rotary_dim, "rope.freq_base": cfg.rope_theta}
    if is_llama:
        fields |= {
            "attention.head_count_kv": cfg.kv_heads,
            "attention.key_length": cfg.head_size,
            "attention.value_length": cfg.head_size,
        }
    if arch == "gptneox":
        fields |= {"use_parallel_residual": cfg.parallel_residual}
    return {f"{arch}.{key}": value for key, value in (fields | _rope_fields(cfg)).items()}


def _rope_fields(cfg: Config) -> dict[str, Any]:
    """How angles are scaled, as far as keys say it: linearly, or by YaRN."""
    scaling = cfg.rope_scaling
    if isinstance(scaling, YarnScaling):
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": int(scaling.context),
        }
    if isinstance(scaling, tuple) and not _is_llama3(cfg):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling[0])}
    return {}


def _is_llama3(cfg: Config) -> bool:
    """Whether frequencies are scaled each by a factor of its own, which a tensor of the file holds."""
    return type(cfg.rope_scaling) is tuple and cfg.rope_scaling[3] != 0


def file_type_fields(type: GGUFType) -> dict[str, Any]:
    """The metadata of the type of a file."""
    import gguf

    fields = {"general.file_type": int(gguf.LlamaFileType[FILE_TYPES[type]])}
    return fields | ({"general.quantization_version": gguf.GGML_QUANT_VERSION} if type.startswith("q") else {})


def _check_config(file: Path, cfg: Config) -> None:
    """Raises InputError if the header of a file is that of another model than its config says."""
    config = open_gguf(file).config
    read_cfg = families.family_from_config(config).config_from_hf(config)
    odd = [f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != getattr(read_cfg, f.name)]
    if odd:
        values = ", ".join(f"{name} {getattr(cfg, name)!r} (only {getattr(read_cfg, name)!r})" for name in odd)
        raise InputError(
            f"a GGUF file of this architecture has no place for {values}; save(params, folder) writes the model for "
            "transformers"
        )


# -------------------------------------------------------------------------------------------------------------- tensors


def _tensors(params: GPT, arch: str, cfg: Config, type: GGUFType) -> dict[str, FileTensor]:
    """The tensors of a file by their names there, in the order in which they are written."""
    family = families.family_of(cfg)
    tensors = mapping.to_hf(params, families.family_of(params.cfg))
    table = next(name for name in tensors if not mapping.is_head(name))
    files: dict[str, FileTensor] = {}
    if _is_llama3(cfg):  # first, as the check of the header reads it
        factors = rope_factors(cfg.rope_scaling, cfg.rope_theta, cfg.rotary_dim // 2).float()  # pyright: ignore
        files[ROPE] = FileTensor("F32", tuple(factors.shape), lambda: factors)
    for hub, source in sources_of(family.config_to_hf(cfg), arch).items():
        x = tensors.get(hub)
        if x is None:  # a head that is the table, or a bias that the model has not
            x = tensors[table] if mapping.is_head(hub) else torch.zeros(source.shape)
        kind = tensor_kind(source.name, source.file_shape, type, is_head_table=cfg.tie_word_embeddings)
        files[source.name] = FileTensor(kind, source.file_shape, _reader(x, source))
    return files


def _reader(x: Tensor, source: Source) -> Callable[[], Tensor]:
    return lambda: (source.order.to_file(x) if source.order else x).detach().cpu()


def tensor_kind(name: str, shape: tuple[int, ...], type: GGUFType, *, is_head_table: bool) -> str:
    """The type of a tensor in a file of a type.

    >>> tensor_kind("blk.0.ffn_up.weight", (8, 64), "q4_0", is_head_table=True)
    'Q4_0'
    >>> tensor_kind("token_embd.weight", (8, 64), "q4_0", is_head_table=True)
    'Q8_0'
    """
    if len(shape) == 1 or name == POSITIONS:
        return "F32"
    if type in ("q8_0", "q4_0") and shape[-1] % BLOCK:
        return "F16"
    if type == "q4_0" and name == (TABLE if is_head_table else HEAD):
        return "Q8_0"
    return type.upper()


# ----------------------------------------------------------------------------------------------------------- the file


def write_gguf_file(
    path: Path, fields: Mapping[str, Any], tensors: Mapping[str, FileTensor], check: Callable[[Path], object]
) -> None:
    """Write a GGUF file, one tensor after the other, under a temporary name that becomes `path` at the end.

    Args:
        path: The file.
        fields: All metadata.
        tensors: By their names in the file, in their order.
        check: Called when the header and the first tensor are written, and the rest is empty: it raises for a header
            that is not to be.
    """
    import gguf

    kinds = {name: gguf.GGMLQuantizationType[x.kind] for name, x in tensors.items()}
    sizes = {name: _num_bytes(tensors[name].shape, *gguf.GGML_QUANT_SIZES[kind]) for name, kind in kinds.items()}
    with atomic_file(path) as partial:
        writer = gguf.GGUFWriter(partial, str(fields["general.architecture"]))
        for key, value in fields.items():
            if key != "general.architecture":
                _add_field(writer, key, value)
        for name, x in tensors.items():
            writer.add_tensor_info(name, x.shape, np.dtype(np.float32), sizes[name], kinds[name])
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for i, (name, x) in enumerate(tensors.items()):
                writer.write_tensor_data(_encode(name, x.read(), kinds[name]))
                if i == 0:
                    rest = sum(sizes.values()) + gguf.GGUF_DEFAULT_ALIGNMENT * len(sizes)
                    _check_header(partial, writer, rest, check)


def _check_header(partial: Path, writer: Any, rest: int, check: Callable[[Path], object]) -> None:
    """Give a file that has no more than a header and a tensor to `check`, at its full length."""
    (file,) = writer.fout
    file.flush()
    at = file.tell()
    os.truncate(partial, at + rest)
    check(partial)
    os.truncate(partial, at)


def _add_field(writer: Any, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def _num_bytes(shape: tuple[int, ...], block: int, block_bytes: int) -> int:
    return math.prod(shape) // block * block_bytes


def _encode(name: str, x: Tensor, kind: Any) -> np.ndarray:
    """The bytes of a tensor in a type. Raises InputError if the type cannot hold it."""
    from gguf.quants import quantize

    if kind.name == "BF16":
        return x.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    values = x.float().contiguous()
    with np.errstate(all="ignore"):
        encoded = quantize(values.numpy(), kind)
    if kind.name == "F16" and not bool(torch.isfinite(values.half()).all()):
        raise InputError(f"tensor {name} has elements that are not finite in fp16: write it as bf16 or f32")
    return encoded
