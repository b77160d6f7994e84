"""What all families share: a hub's tensors and our leaves, by a table of names.

A family is such a table, and its config both ways. The sizes come from our own tree: a leaf has the shape that
`skeleton` gives it, and a tensor of the hub's the shape that its leaves make up.
"""

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fgpt.errors import InputError, shown
from fgpt.kernels.quantized_linear import BLOCK, QUANTIZED, Blockwise4bit, Blockwise8bit, Quantized
from fgpt.kernels.rotary import DynamicScaling, YarnScaling
from fgpt.model import GPT, Config, Embedding, FusedAttention, Linear, Norm, RMSNorm, abstract_params, fused_qkv
from fgpt.tree import leaves, replace_at, walk
from fgpt.weights import Adapted, shape


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is asked for: its shape, where that can be told before, and how to read it."""

    shape: tuple[int, ...] | None
    read: Callable[[], Tensor | Quantized]


@dataclass(frozen=True)
class TensorMapping:
    """A tensor of the hub's, and the leaves of ours that it holds, as rows one after the other."""

    name: str
    paths: tuple[str, ...]
    transposed: bool = False
    """[in, out]. One that was quantized on the way to the hub was transposed before, and is [out, in]."""
    heads: int = 0
    """Above 0 the leaves take turns, head by head."""


@dataclass(frozen=True)
class Family:
    """What a file of this package says of its models."""

    model_types: tuple[str, ...]
    """What config.json calls them."""
    prefix: str
    """Before the names of all tensors but the head's, where a file has the head."""
    buffers: tuple[str, ...]
    """Endings of tensors that are no parameters."""
    config_from_hf: Callable[[Mapping[str, Any]], Config]
    config_to_hf: Callable[[Config], dict[str, Any]]
    tensor_mappings: Callable[[Config], list[TensorMapping]]


SCORE = "score.weight"
"""The head of a classifier, in every family."""

Place: TypeAlias = Callable[[str, Any], Any]
"""(path, leaf) -> what stands there: cast, or quantized."""


def one_to_one(names: Mapping[str, str]) -> list[TensorMapping]:
    """The tensors that are one leaf each: {our path: the hub's name}."""
    return [TensorMapping(name, (path,)) for path, name in names.items()]


def layer_mappings(names: Mapping[str, str], bare: Container[str]) -> list[TensorMapping]:
    """The same for {our layer: the hub's module}: weight and bias of each, where they are among `bare`, our leaves."""
    pairs = (
        (f"{ours}.{leaf}", f"{theirs}.{ending}")
        for ours, theirs in names.items()
        for leaf, ending in (("w", "weight"), ("b", "bias"))
    )
    return one_to_one({path: name for path, name in pairs if path in bare})


# --------------------------------------------------------------------------------------------------------- hub to ours


def parameters(tensors: Mapping[str, LazyTensor], cfg: Config, family: Family) -> tuple[dict[str, LazyTensor], Config]:
    """The parameters among a hub's tensors, without the family's prefix, and the config that is true of them.

    Where the config says that head and embedding are one, and the tensors are two that differ (the head was trained by
    itself, and merged), they are two. An equal head is left out, and one alone stands for the embedding.

    Raises InputError where a tensor is there by two names; and as `from_hf` does, before head and embedding are read.
    """
    bare_tensors = _without_prefix(tensors, family)
    if not cfg.tie_word_embeddings:
        return bare_tensors, cfg
    untied = replace(cfg, tie_word_embeddings=False)
    stored = {s.paths[0]: s.name for s in family.tensor_mappings(untied)}
    table, head = stored["wte.w"], stored["head.w"]
    if head not in bare_tensors:
        return bare_tensors, cfg
    if table not in bare_tensors:
        return {table if name == head else name: x for name, x in bare_tensors.items()}, cfg
    _check_shapes(bare_tensors, untied, family)
    if _equal(bare_tensors[table].read(), bare_tensors[head].read()):
        return {name: x for name, x in bare_tensors.items() if name != head}, cfg
    return bare_tensors, untied


def from_hf(tensors: Mapping[str, LazyTensor], cfg: Config, family: Family, place: Place = lambda path, x: x) -> GPT:
    """Our tree of the hub's tensors, each read, split, and given to `place` before the next is read. Transposed weights
    are views: no copy is made.

    A quantized product of q, k and v is split where its blocks, and the blocks of quantized scales, end between them
    (for NF4 with double quantization, where d_model is a multiple of 128); else they stay one, as `fuse` makes them.

    `held` and `cfg` are those of `parameters`.

    Raises InputError where a tensor is missing, surplus, or of another shape; before anything is read, but for the
    shape of a quantized one.
    """
    bare, table = abstract_params(cfg), {s.name: s for s in family.tensor_mappings(cfg)}
    empty, sizes = leaves(bare), _check_shapes(tensors, cfg, family)

    def read(
        s: TensorMapping,
    ) -> dict[str, Any]:  # a function, so that nothing of one tensor is left when the next is read
        x, size = tensors[s.name].read(), sizes[s.name]
        _check_shape(s.name, size[::-1] if s.transposed and not isinstance(x, Tensor) else size, tuple(x.shape))
        if isinstance(x, Tensor) and not x.is_floating_point():  # as numbers they would be of another size
            raise InputError(f"tensor {s.name}: expected a floating dtype, got {str(x.dtype).removeprefix('torch.')}")
        parts = split(x, s, [tuple(empty[p].shape) for p in s.paths])
        if len(parts) < len(s.paths):
            return {s.paths[0].removesuffix(".q.w") + ".qkv.w": x}
        return {path: place(path, part) for path, part in zip(s.paths, parts, strict=True)}

    new: dict[str, Any] = {}
    for s in table.values():
        new |= read(s)
    for attn in [path.removesuffix(".qkv.w") for path in new if path.endswith(".qkv.w")]:
        bare = replace_at(bare, {attn: FusedAttention(fused_qkv(_node(bare, attn)), _node(bare, f"{attn}.o"))})
        biases = [new.pop(f"{attn}.{x}.b") for x in "qkv" if f"{attn}.{x}.b" in new]
        new |= {f"{attn}.qkv.b": torch.cat(biases)} if biases else {}
    return replace_at(bare, new)


def _without_prefix(tensors: Mapping[str, LazyTensor], family: Family) -> dict[str, LazyTensor]:
    """All tensors but buffers, named alike: a file with the head has the prefix, one without has not.

    Raises InputError where a tensor is there by both names.
    """
    names = [name for name in tensors if not name.endswith(family.buffers)]
    bare = {name.removeprefix(family.prefix): tensors[name] for name in names}
    if len(bare) < len(names):
        twice = next(name for name in names if name.startswith(family.prefix) and name[len(family.prefix) :] in names)
        raise InputError(f"tensor {twice} is there without {family.prefix} too: expected one of them")
    return bare


def _equal(a: Any, b: Any) -> bool:
    """Whether two matrices are of the same numbers; a quantized one equals none."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wide), b.to(wide))


def _check_shapes(tensors: Mapping[str, LazyTensor], cfg: Config, family: Family) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor of the family has under a config.

    Raises InputError where one is missing, surplus, or of another shape.
    """
    table = {s.name: s for s in family.tensor_mappings(cfg)}
    if missing := [name for name in table if name not in tensors]:
        raise InputError(f"tensor {missing[0]} is missing ({len(missing)} in all): not a whole model of this config")
    if surplus := tensors.keys() - table.keys():
        raise InputError(f"tensor {min(surplus)} has no place in a model of this config ({len(surplus)} in all)")
    empty = leaves(abstract_params(cfg))
    sizes = {name: tuple(join_heads([empty[p] for p in s.paths], s).shape) for name, s in table.items()}
    for name, size in sizes.items():
        _check_shape(name, size, tensors[name].shape)
    return sizes


def _check_shape(name: str, want: tuple[int, ...], got: tuple[int, ...] | None) -> None:
    if got is not None and got != want:
        raise InputError(f"tensor {name}: expected shape {list(want)}, got {list(got)}")


def _node(tree: Any, path: str) -> Any:
    return dict(walk(tree))[path]


def split(x: Any, s: TensorMapping, sizes: list[tuple[int, ...]]) -> list[Any]:
    """The leaves in a tensor; it alone where it is quantized and cannot be split."""
    if len(s.paths) == 1:
        return [x.T if s.transposed and isinstance(x, Tensor) else x]
    if isinstance(x, QUANTIZED):
        if s.heads:
            raise InputError(f"tensor {s.name}: q, k and v alternate by heads, and are quantized: quantize a plain one")
        return equal_parts(x, len(s.paths)) or [x]
    if s.heads:
        parts = x.unflatten(0, (s.heads, len(s.paths), -1)).unbind(1)
        return [part.flatten(0, 1) for part in parts]
    return list((x.T if s.transposed and x.ndim == 2 else x).split([size[0] for size in sizes]))


def join_heads(parts: list[Tensor], s: TensorMapping) -> Tensor:
    """The tensor of the leaves `parts`, as the hub has it."""
    if s.heads:
        return torch.stack([x.unflatten(0, (s.heads, -1)) for x in parts], 1).flatten(0, 2)
    x = parts[0] if len(parts) == 1 else torch.cat(parts)
    return x.T if s.transposed else x


def equal_parts(w: Quantized, n: int) -> list[Any] | None:
    """The rows of `w` in n equal parts, still quantized as they are; None where a block lies across two parts."""
    per = w.block if isinstance(w, Blockwise8bit) else BLOCK if isinstance(w, Blockwise4bit) else w.shape[1]
    if w.shape.numel() % (n * per):
        return None
    scales = list(w.absmax.chunk(n)) if isinstance(w.absmax, Tensor) else equal_parts(w.absmax, n)
    return scales and [replace(w, codes=c, absmax=a) for c, a in zip(w.codes.chunk(n), scales, strict=True)]


# --------------------------------------------------------------------------------------------------------- ours to hub


def to_hf(params: GPT, family: Family) -> dict[str, Tensor]:
    """The hub's tensors of our tree, as a file with the head names them: of a head of tokens, or of classes.

    Raises InputError for a tree that still carries adapters.
    """
    if adapted := [path for path, x in walk(params) if isinstance(x, Adapted)]:
        raise InputError(f"{adapted[0]} still carries an adapter: merge(params) first")
    by_path, cfg = unfuse_qkv(leaves(params), params.cfg), params.cfg
    classes = params.head is not None and shape(params.head.w)[0] != cfg.vocab_size
    body = replace(cfg, tie_word_embeddings=True) if classes else cfg  # without a head of tokens
    tensors = {s.name: join_heads([by_path[path] for path in s.paths], s) for s in family.tensor_mappings(body)}
    named = {name if is_head(name) else family.prefix + name: x for name, x in tensors.items()}
    return named | ({SCORE: by_path["head.w"]} if classes else {})


def unfuse_qkv(tensors: Mapping[str, Tensor], cfg: Config) -> dict[str, Tensor]:
    """`tensors` by path, with those of q, k and v in one as those of each."""
    n, kv = (cfg.head_size * heads for heads in (cfg.n_head, cfg.kv_heads))
    unfused: dict[str, Tensor] = {}
    for path, x in tensors.items():
        layer, _, leaf = path.rpartition(".")
        if layer.endswith(".attn.qkv"):
            names = (f"{layer.removesuffix('qkv')}{part}.{leaf}" for part in "qkv")
            unfused |= dict(zip(names, x.split((n, kv, kv)), strict=True))
        else:
            unfused[path] = x
    return unfused


def leaf_paths(cfg: Config) -> Container[str]:
    """Our leaves under a config."""
    return leaves(abstract_params(cfg)).keys()


def is_head(name: str) -> bool:
    """Whether a tensor is the head's, which no prefix is before."""
    return name.rpartition(".")[0] in ("lm_head", "embed_out")


def check_params(params: GPT) -> None:
    """Raises InputError where a part of `params` has not the size that its config gives it."""
    cfg = params.cfg
    bare = abstract_params(cfg)
    want: dict[str, Any] = {path: x for path, x in walk(bare) if isinstance(x, Linear | Embedding | Norm | RMSNorm)}
    for i, p in enumerate(params.blocks[: cfg.n_layer]):
        if isinstance(p.attn, FusedAttention):
            want[f"blocks.{i}.attn.qkv"] = fused_qkv(bare.blocks[i].attn)
            for part in "qkv":
                del want[f"blocks.{i}.attn.{part}"]
    got: dict[str, Any] = {path: x for path, x in walk(params) if isinstance(x, Linear | Embedding | Norm | RMSNorm)}
    if len(params.blocks) < cfg.n_layer:
        raise InputError(f"blocks.{len(params.blocks)} is missing: not a whole model of its config")
    if odd := sorted(want.keys() ^ got.keys()):
        raise InputError(f"{odd[0]} is {'missing' if odd[0] in want else 'surplus'}: not a whole model of its config")
    for path, x in got.items():
        if type(x) is not type(want[path]):
            raise InputError(f"{path}: expected {type(want[path]).__name__}, got {type(x).__name__}")
        sizes = [tuple(y.w.shape) if isinstance(y, Norm | RMSNorm) else shape(y.w) for y in (want[path], x)]
        if sizes[0] != sizes[1]:
            raise InputError(f"{path}.w: expected shape {list(sizes[0])}, got {list(sizes[1])}")
        biases = [None if (b := getattr(y, "b", None)) is None else list(b.shape) for y in (want[path], x)]
        if biases[0] != biases[1]:
            raise InputError(f"{path}.b: expected shape {biases[0]}, got {biases[1]}")
        if isinstance(x.w, Tensor) and not x.w.is_floating_point():
            raise InputError(f"{path}.w: expected a floating dtype, got {x.w.dtype}")


# -------------------------------------------------------------------------------------------------------------- configs


MAX_SIZE, MAX_LAYERS = 1 << 24, 1 << 10
"""The largest size, and number of layers, that a config may have: far above any model's, and far below what would fill
the memory with the names of layers, or overflow the size of a tensor.
"""


def require_positive_ints(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises InputError where one of `names` is missing or no whole number from 1 to MOST."""
    bad = [name for name in names if type(config.get(name)) is not int or not 1 <= config[name] <= MAX_SIZE]
    if bad:
        got = f"{bad[0]}={shown(config[bad[0]])}" if bad[0] in config else f"no {bad[0]}"
        raise InputError(
            f"config.json: expected whole numbers above 0 for {', '.join(bad)}, up to {MAX_SIZE}; got {got}"
        )


def optional_size(config: Mapping[str, Any], name: str, default: int) -> int:
    """A size that a config may leave out, or as null or 0 to its default. Raises InputError as `whole_numbers` does."""
    if name not in config or config[name] in (None, 0):
        return default
    require_positive_ints(config, [name])
    return config[name]


def number(config: Mapping[str, Any], name: str, default: float) -> float:
    """A field that is no size. Raises InputError for anything but a number from 0 to 1e15."""
    found = config.get(name, default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 1e15:  # NaN is not
        raise InputError(f"config.json: expected a number from 0 to 1e15 for {name}, got {shown(found)}")
    return float(found)


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """A field that is true or false. Raises InputError for anything else: "false", for one, is true to Python."""
    found = config.get(name, default)
    if not isinstance(found, bool):
        raise InputError(f"config.json: expected true or false for {name}, got {shown(found)}")
    return found


LLAMA_SIZES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "d_mlp",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_ctx",
}
"""A hub's names of sizes, and ours, in the families since GPT-NeoX."""


def sizes(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """The sizes that a config must have, by our names. Raises InputError as `whole_numbers` does, and for more than
    DEEPEST layers.
    """
    require_positive_ints(config, names)
    found = {ours: config[theirs] for theirs, ours in names.items()}
    if found["n_layer"] > MAX_LAYERS:
        raise InputError(f"config.json: expected at most {MAX_LAYERS} layers, got {found['n_layer']}")
    return found


def sizes_to_hf(cfg: Config, names: Mapping[str, str]) -> dict[str, int]:
    """`sizes` undone."""
    return {theirs: getattr(cfg, ours) for theirs, ours in names.items()}


def require_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises InputError where a field has another value than the one we compute with, which an absent one has too."""
    for name, value in values.items():
        if config.get(name, value) != value:
            raise InputError(f"config.json: {name}={shown(config[name])} is not supported, expected {value!r}")


ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
"""The hub's names of activations, and ours: those of one function differ in their rounding alone."""


def activation(config: Mapping[str, Any], name: str, default: str) -> Any:
    """Our name of the activation that a config has. Raises InputError for one that we do not compute."""
    found = config.get(name, default)
    if not isinstance(found, str) or found not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"config.json: {name}={shown(found)} is not supported, expected one of {known}")
    return ACTIVATIONS[found]


def activation_to_hf(cfg: Config) -> str:
    """The hub's first name of our activation."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == cfg.activation)


LLAMA_3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""The fields of Llama 3's scaling, as our `stretch` has them."""


ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")


def rope(config: Mapping[str, Any], sizes: Mapping[str, int], dim: int) -> dict[str, Any]:
    """The `base`, `stretch` and `context` of our config, of what old and new configs say of rotary positions; of the
    `sizes` that it has by our names, and the `dim` components that are rotated.

    Raises InputError for a scaling that we do not compute.
    """
    scaling, context = rope_fields(config), sizes["n_ctx"]
    where = scaling if "rope_theta" in scaling else config
    base = _positive(where, "rope_theta" if "rope_theta" in where else "rotary_emb_base", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise InputError(f"config.json: rope_type={shown(kind)} is not supported, expected one of {known}")
    required = {"linear": ("factor",), "dynamic": ("factor",), "llama3": LLAMA_3}.get(kind, ())
    if missing := [name for name in required if name not in scaling]:
        raise InputError(f"config.json: rope_scaling of type {kind!r} lacks a number for {missing[0]!r}")
    rope_scaling: Any = None
    if kind == "linear":
        rope_scaling = (_positive(scaling, "factor"), 1.0, 4.0, 0.0)
    elif kind == "llama3":
        rope_scaling = tuple(_positive(scaling, name) for name in LLAMA_3)
        if rope_scaling[1] >= rope_scaling[2]:
            raise InputError(f"config.json: expected low_freq_factor below high_freq_factor, got {rope_scaling[1:3]}")
    elif kind == "yarn":
        rope_scaling = _yarn(config, scaling, context)
        if base <= 1 or dim < 2:
            raise InputError(f"config.json: yarn wants rope_theta above 1 and rotated pairs, got {base} and {dim}")
        try:
            rope_scaling.divided(dim, base)
        except (ValueError, OverflowError):
            raise InputError(f"config.json: the numbers of yarn are too far apart: {shown(dict(scaling))}") from None
    elif kind == "dynamic":
        rope_scaling = DynamicScaling(_positive(scaling, "factor"), context)
        if rope_scaling.factor < 1 or rope_scaling.factor * context > MAX_SIZE or dim <= 2:
            raise InputError(
                f"config.json: a dynamic rope wants a factor of 1 or more, up to {MAX_SIZE} positions, and 4 rotated "
                f"components or more; got {rope_scaling.factor}, {context} positions and {dim} components"
            )
        context = int(rope_scaling.factor * context)
    return {"rope_theta": base, "rope_scaling": rope_scaling, "n_ctx": context}


def _yarn(config: Mapping[str, Any], scaling: Mapping[str, Any], context: int) -> YarnScaling:
    """YaRN as transformers reads it: what is left out has the values of the paper.

    Source: Peng et al. 2023 (YaRN), section 3.4; DeepSeek-AI 2024 (DeepSeek-V2) for the two mscale.
    """
    name = "original_max_position_embeddings"
    original = _positive(config if config.get(name) is not None else scaling, name, float(context))
    factor = _optional_positive(scaling, "factor") or context / original
    size, whole = _optional_positive(scaling, "mscale"), _optional_positive(scaling, "mscale_all_dim")
    grown = math.log(factor) if factor > 1 else 0.0
    usual = (0.1 * size * grown + 1) / (0.1 * whole * grown + 1) if size and whole else 0.1 * grown + 1
    return YarnScaling(
        factor,
        _optional_positive(scaling, "beta_fast") or 32.0,
        _optional_positive(scaling, "beta_slow") or 1.0,
        original,
        _optional_positive(scaling, "attention_factor") or usual,
        flag(scaling, "truncate", True),
    )


def _optional_positive(fields: Mapping[str, Any], name: str) -> float | None:
    """A number above 0, or None where it is left out, null or 0."""
    return None if fields.get(name) is None else number(fields, name, 0.0) or None


def rope_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of rotary positions in a field of its own. Raises InputError where it is no object."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise InputError(f"config.json: rope_scaling={shown(found)} is not supported, expected its fields")
    return found


def _positive(config: Mapping[str, Any], name: str, default: float = 0.0) -> float:
    if not (found := number(config, name, default)):
        raise InputError(f"config.json: expected a number above 0 for {name}, got {shown(config.get(name))}")
    return found


def rope_to_hf(cfg: Config) -> dict[str, Any]:
    """`rope` undone, as old and new readers know it."""
    if (stretch := cfg.rope_scaling) is None:
        scaling = None
    elif isinstance(stretch, YarnScaling):
        scaling = {"rope_type": "yarn"} | stretch._asdict()
        scaling["original_max_position_embeddings"] = int(scaling.pop("context"))
    elif isinstance(stretch, DynamicScaling):
        scaling = {"rope_type": "dynamic", "factor": stretch.factor}
        return {"rope_theta": cfg.rope_theta, "rope_scaling": scaling, "max_position_embeddings": stretch.context}
    elif stretch[3] == 0:
        scaling = {"rope_type": "linear", "factor": stretch[0]}
    else:
        scaling = {"rope_type": "llama3"} | dict(zip(LLAMA_3, stretch, strict=True))
        scaling["original_max_position_embeddings"] = int(stretch[3])
    return {"rope_theta": cfg.rope_theta, "rope_scaling": scaling}
