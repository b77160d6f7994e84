"""Trees as files: a tree of known nodes, params or adapters, in one safetensors file, bit by bit.

A tensor is named by its path, `blocks.0.attn.q.w.codes`; below the key of a dict, which may hold dots of its own, the
path goes on after a slash, `blocks.0.attn.q/a`. What the tensors make up is JSON in the file's metadata, nodes by their
class with static fields among the others:

    {"GPT": {"wte": {"Embedding": {"w": "tensor"}}, "blocks": {"tuple": [..]}, .., "cfg": {"n_layer": 12, ..}}}

A reader builds the classes in NODES and no other, and holds every field against what its class declares: the class of a
node, the dtype and axes of a tensor (an axis that is named twice in a node has one size), the type of a static field.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from jaxtyping import jaxtyped
from torch import Tensor

from fgpt._typing import StrPath
from fgpt.adapter_dora import DoRA
from fgpt.adapter_ia3 import IA3
from fgpt.adapter_lora import LoRA
from fgpt.adapter_trainable_tokens import TrainableTokens
from fgpt.adapter_types import Adapters
from fgpt.adapter_vera import VeRA
from fgpt.adapters import adapt
from fgpt.errors import InputError
from fgpt.io.safetensors_files import read_metadata, read_tensors, write_tensors
from fgpt.kernels.bitsandbytes_ops import register
from fgpt.kernels.hadamard import MAX_BLOCK, MIN_BLOCK
from fgpt.kernels.quantized_linear import BLOCK, QUANTIZED, Blockwise4bit, Blockwise8bit, Quantized, Rotated
from fgpt.kernels.rotary import DynamicScaling, YarnScaling
from fgpt.layers import has_quantized
from fgpt.model import GPT, MLP, Attention, Block, Config, Embedding, FusedAttention, Linear, Norm, RMSNorm
from fgpt.model.config import BIASES
from fgpt.sharding import PARTS
from fgpt.tree import device, leaves, tree_map

PARAMS = (GPT, Embedding, Block, Norm, RMSNorm, Attention, FusedAttention, MLP, Linear, *QUANTIZED)
NODES: dict[str, type] = {cls.__name__: cls for cls in (*PARAMS, LoRA, DoRA, IA3, TrainableTokens, VeRA)}

FORMAT, STRUCTURE = "fgpt", "structure"
"""What the metadata's `format` says, so that other libraries refuse the file, and its entry for the structure."""

OPTIONAL_CONFIG_FIELDS = ("sliding_window", "full_layers", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
"""Fields of Config that older files do not have: their models are those of the defaults."""

RENAMED_NODES = {"FourBit": "Blockwise4bit", "Blockwise8": "Blockwise8bit", "Rowwise8": "RowwiseInt8"}
RENAMED_CONFIG_FIELDS = {
    "context": "n_ctx",
    "vocab": "vocab_size",
    "eps": "norm_eps",
    "tied": "tie_word_embeddings",
    "act": "activation",
    "norm": "norm_type",
    "gated": "gated_mlp",
    "parallel": "parallel_residual",
    "norms": "n_norms",
    "rotary": "rotary_dim",
    "base": "rope_theta",
    "stretch": "rope_scaling",
}
"""Nodes and fields of Config that have other names in older files, by those names."""

BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes' operators take for a block."""

ROTATED_BLOCKS = tuple(2**i for i in range(MIN_BLOCK.bit_length() - 1, MAX_BLOCK.bit_length()))
"""What a rotation has for a block."""


# ------------------------------------------------------------------------------------------------------------- writing


def write_tree(path: Path, tree: Any) -> None:
    """Write `tree`, made of NODES, tuples, dicts and tensors.

    Raises InputError for anything else, such as a params tree that still carries adapters.
    """
    tensors: dict[str, Tensor] = {}
    structure = _structure(tree, "", "", tensors)
    write_tensors(path, tensors, {"format": FORMAT, STRUCTURE: json.dumps(structure)})


def _structure(x: Any, name: str, below: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON of `x`, whose tensors go into `tensors`; `below` begins the names of its children."""
    if isinstance(x, Tensor):
        if name in tensors:
            raise InputError(f"two tensors of the tree are called {name}")
        tensors[name] = x
        return "tensor"
    if isinstance(x, Mapping):
        return {"dict": {k: _structure(v, f"{below}{k}", f"{below}{k}/", tensors) for k, v in x.items()}}
    if isinstance(x, tuple):
        return {"tuple": [_structure(v, f"{below}{i}", f"{below}{i}.", tensors) for i, v in enumerate(x)]}
    if type(x) not in NODES.values():
        remedy = "unshard(tree)" if isinstance(x, PARTS) else "merge(params)"
        raise InputError(f"{name or 'the tree'} is {type(x).__name__}, which files do not hold; {remedy} first")
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(x):
        value = getattr(x, f.name)
        if f.metadata.get("static"):
            fields[f.name] = _static_to_json(value)
        elif value is not None:
            fields[f.name] = _structure(value, f"{below}{f.name}", f"{below}{f.name}.", tensors)
    return {type(x).__name__: fields}


def _static_to_json(value: Any) -> Any:
    """A static field as JSON."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return config_to_json(value) if isinstance(value, Config) else value


def config_to_json(cfg: Config) -> dict[str, Any]:
    """The fields of a config as JSON: equal for equal configs."""
    return dataclasses.asdict(cfg) | {"biases": sorted(cfg.biases)}


# ------------------------------------------------------------------------------------------------------------- reading


def read_tree(path: Path) -> Any:
    """The tree in a file that `write_tree` has made.

    Raises InputError for a file that is truncated or not written by fgpt, for a tensor that is missing or surplus, and
    for a node or a field that is not what its class declares.
    """
    tensors, metadata = read_tensors(path), read_metadata(path)
    if metadata.get("format") != FORMAT or STRUCTURE not in metadata:
        raise InputError(f"{path}: format is {metadata.get('format')!r}; expected a file that fgpt has saved")
    try:
        tree = _build(json.loads(metadata[STRUCTURE]), "", "", tensors)
    except InputError as err:
        raise InputError(f"{path}: {err}") from None
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: its structure is not valid JSON: {err}") from None
    if tensors:
        raise InputError(f"{path}: tensor {min(tensors)} has no place in the structure ({len(tensors)} in all)")
    if has_quantized(tree):
        register()
    return tree


def _build(form: Any, name: str, below: str, tensors: dict[str, Tensor]) -> Any:
    """What `form` describes, its tensors taken out of `tensors`."""
    if form == "tensor":
        if name not in tensors:
            raise InputError(f"tensor {name} is missing")
        return tensors.pop(name)
    match form:
        case {"dict": dict(items), **rest} if not rest:
            if odd := [key for key in items if not key.isprintable()]:
                raise InputError(f"a key of {name or 'the tree'} is {odd[0]!r:.80}; expected printable text")
            return {k: _build(v, f"{below}{k}", f"{below}{k}/", tensors) for k, v in items.items()}
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_build(v, f"{below}{i}", f"{below}{i}.", tensors) for i, v in enumerate(items))
        case dict() if len(form) == 1 and isinstance(fields := form[key := str(next(iter(form)))], dict):
            cls = NODES.get(RENAMED_NODES.get(key, key))
            if cls is not None:
                return _node(cls, fields, name, below, tensors)
    raise InputError(f"{name or 'the tree'} is {json.dumps(form)[:60]}; expected a tensor, dict, tuple or known node")


def _node(cls: type, form: Mapping[str, Any], name: str, below: str, tensors: dict[str, Tensor]) -> Any:
    from beartype.door import is_bearable  # here, because importing it takes longer than the rest of fgpt

    at = name or cls.__name__
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if surplus := form.keys() - fields.keys():
        raise InputError(f"{at}: {cls.__name__} has no field {min(surplus)!r}")
    values: dict[str, Any] = {}
    with jaxtyped("context"):  # within it, an axis that is named twice has one size
        for f in fields.values():
            value: Any
            if f.name not in form:
                value = None  # as None fields are written; if None is not allowed, the check says so
            elif f.metadata.get("static"):
                value = _static(form[f.name], f.type)
            else:
                value = _build(form[f.name], f"{below}{f.name}", f"{below}{f.name}.", tensors)
            many = get_origin(f.type) is tuple and isinstance(value, tuple)  # beartype itself looks at one of them
            kind: Any = get_args(f.type)[0] if many else f.type
            if not all(is_bearable(x, kind) for x in (value if many else [value])):
                got = (
                    f"{value.dtype} {list(value.shape)}"
                    if isinstance(value, Tensor)
                    else " ".join(repr(value)[:60].split())
                )
                raise InputError(f"{below}{f.name}: expected {getattr(f.type, '__name__', f.type)}, got {got}")
            values[f.name] = value
    x = cls(**values)
    if isinstance(x, QUANTIZED):
        check_quantized(x, at)
    if isinstance(x, LoRA) and not (len(x.a) and math.isfinite(x.alpha) and 0 <= x.dropout < 1):
        got = f"rank {len(x.a)}, alpha {x.alpha} and dropout {x.dropout}"
        raise InputError(
            f"{at}: expected a rank above 0, a finite alpha and a dropout from 0 to less than 1, got {got}"
        )
    return x


def _static(value: Any, kind: Any) -> Any:
    """A static field from JSON; unchanged if it does not fit, for the check to refuse."""
    from beartype.door import is_bearable

    if kind is torch.dtype and isinstance(value, str):
        return getattr(torch, value, value)
    if kind == tuple[int, ...] and isinstance(value, list):
        return tuple(value)
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if kind is Config and isinstance(value, dict):
        declared: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config)}
        stored: dict[str, Any] = value
        fields: dict[str, Any] = {}
        for name, x in stored.items():
            fields[RENAMED_CONFIG_FIELDS.get(name, name)] = tuple(x) if isinstance(x, list) else x
        fields = {name: getattr(Config, name) for name in OPTIONAL_CONFIG_FIELDS} | fields
        fields["rope_scaling"] = _rope_scaling(fields.get("rope_scaling"))
        fields["biases"] = _biases(fields.get("biases"))
        fits = fields.keys() == declared.keys() and all(is_bearable(fields[k], declared[k]) for k in declared)
        return Config(**fields) if fits else value
    return value


def _biases(value: Any) -> Any:
    """The layers with a bias, of a list or, in older files, of one string; unchanged if it does not fit."""
    names = value.split() if isinstance(value, str) else value
    fits = isinstance(names, list | tuple) and all(isinstance(name, str) and name in BIASES for name in names)
    return frozenset(names) if fits and len({*names}) == len(names) else value


def _rope_scaling(values: Any) -> Any:
    """The RoPE scaling of a list of its fields; unchanged if it does not fit."""
    from beartype.door import is_bearable

    for cls in (YarnScaling, DynamicScaling):
        kinds = list(get_type_hints(cls).values())
        if isinstance(values, tuple) and len(values) == len(kinds):
            return cls(*values) if all(map(is_bearable, values, kinds)) else "no scaling"
    return values


def check_quantized(w: Quantized, name: str) -> None:
    """What the fields of a quantized weight owe each other, beyond what its class declares.

    Raises InputError if codes and scales do not belong together.
    """
    if isinstance(w, Rotated):  # its base is checked by itself
        if w.block not in ROTATED_BLOCKS or w.shape[1] % w.block:
            blocks = ", ".join(map(str, ROTATED_BLOCKS))
            raise InputError(
                f"{name}: block is {w.block}; expected one of {blocks} that divides a row of {w.shape[1]} elements"
            )
        return
    if any(x.is_floating_point() and x.dtype != torch.float32 for x in leaves(w).values()):
        raise InputError(f"{name}: scales and code of a quantized weight are float32")
    if not w.dtype.is_floating_point:
        raise InputError(f"{name}: expected a floating dtype for what a quantized weight stands for, got {w.dtype}")
    scales: Any = w.absmax.codes if isinstance(w.absmax, Blockwise8bit) else w.absmax
    if isinstance(w, Blockwise4bit):
        if w.shape[1] % BLOCK or isinstance(w.absmax, Blockwise8bit) != (w.offset is not None) or scales.ndim != 1:
            raise InputError(
                f"{name}: expected rows of whole blocks of {BLOCK}, and an offset to quantized scales only"
            )
        expected = w.shape.numel() // BLOCK
    elif isinstance(w, Blockwise8bit):
        if w.block not in BLOCKS:
            raise InputError(f"{name}: block is {w.block}; expected one of {', '.join(map(str, BLOCKS))}")
        expected = -(-w.shape.numel() // w.block)
    else:
        expected = w.shape[0]
    if len(scales) != expected:
        raise InputError(f"{name}: {list(w.shape)} elements need {expected} scales, got {len(scales)}")


# ------------------------------------------------------------------------------------------------------------ adapters


def save_adapters(adapters: Adapters, path: StrPath) -> None:
    """Write any adapters, unions and tuned leaves too, as one file that `load_adapters` reads back bit by bit.

    For what PEFT knows, `save_peft` writes what other libraries read.

    Args:
        adapters: Any adapters.
        path: The file to write, in safetensors' format.

    Raises:
        InputError: if the file cannot be written.

    >>> import tempfile, fgpt
    >>> params = fgpt.load("nano")
    >>> adapters = fgpt.lora(params, fgpt.key(0), rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fgpt.save_adapters(adapters, f"{folder}/adapters.safetensors")
    ...     sorted(fgpt.load_adapters(f"{folder}/adapters.safetensors", params)) == sorted(adapters)
    True
    """
    write_tree(Path(path), adapters)


def load_adapters(path: StrPath, params: Any) -> Adapters:
    """The adapters that `save_adapters` has written, on the device of `params`.

    Args:
        path: A file of `save_adapters`.
        params: The model that the adapters are for.

    Raises:
        InputError: if the file holds something else, or what does not fit `params`.

    >>> import tempfile, fgpt
    >>> params = fgpt.load("nano")
    >>> adapters = fgpt.lora(params, fgpt.key(0), rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fgpt.save_adapters(adapters, f"{folder}/adapters.safetensors")
    ...     sorted(fgpt.load_adapters(f"{folder}/adapters.safetensors", params)) == sorted(adapters)
    True
    """
    path = Path(path)
    adapters = read_tree(path)
    kinds = Tensor | LoRA | DoRA | IA3 | TrainableTokens | VeRA
    if not isinstance(adapters, dict) or not all(isinstance(x, kinds) for x in adapters.values()):
        raise InputError(f"{path}: expected adapters, got {type(adapters).__name__}; is it a model? load(folder)")
    return check_fits(adapters, params, path)


def check_fits(adapters: Adapters, params: Any, source: Path) -> Adapters:
    """`adapters` from a file, on the device of `params`, or where they are if those have no storage.

    Raises InputError if they do not fit.
    """
    at = device(params)
    if at.type != "meta":
        adapters = tree_map(lambda x: x.to(at), adapters)
    try:
        adapt(params, adapters)
    except InputError as err:
        raise InputError(f"{source}: {err}") from None
    return adapters
