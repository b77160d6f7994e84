"""What all families share: a hub's tensors and our leaves, by a table of names.

A family is such a table, and its config both ways. The sizes come from our own tree: a leaf has the shape that
`abstract_params` gives it, and a tensor of Hugging Face's the shape that its leaves make up.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.quantized_linear import (
    BLOCK,
    QUANTIZED,
    Blockwise4bit,
    Blockwise8bit,
    Quantized,
    Rotated,
    RowwiseInt8,
    gather_base,
    slice_rows,
)
from fgpt.model import GPT, Config, Embedding, FusedAttention, Linear, Norm, RMSNorm, abstract_params, fused_qkv
from fgpt.tree import device, leaves, replace_at, walk
from fgpt.weights import Adapted, shape


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not read yet: its shape, if that is known before, and the function that reads it."""

    shape: tuple[int, ...] | None
    read: Callable[[], Tensor | Quantized]
    read_part: Callable[[int, Sequence[slice]], Tensor] | None = None
    """(axis, ranges) -> of a matrix what is at these indices of the axis, in order, and nothing else is read; None if
    there is no such way."""


@dataclass(frozen=True)
class TensorMapping:
    """A tensor of Hugging Face's model, and our leaves in it, whose rows are concatenated."""

    name: str
    paths: tuple[str, ...]
    transposed: bool = False
    """Stored as [in, out]. A quantized one was transposed before, and is [out, in]."""
    heads: int = 0
    """If above 0, the rows of the leaves are interleaved, head by head."""


@dataclass(frozen=True)
class Family:
    """A family of models: its config both ways, and its table of tensors."""

    model_types: tuple[str, ...]
    """The values of model_type in config.json."""
    prefix: str
    """Prefix of all tensor names but the head's, in a file with a head."""
    buffers: tuple[str, ...]
    """Suffixes of tensors that are no parameters."""
    config_from_hf: Callable[[Mapping[str, Any]], Config]
    config_to_hf: Callable[[Config], dict[str, Any]]
    tensor_mappings: Callable[[Config], list[TensorMapping]]


SCORE = "score.weight"
"""The head of a classifier, in every family."""

Place: TypeAlias = Callable[[str, Any], Any]
"""(path, leaf) -> what stands there: cast, or quantized."""


def one_to_one(names: Mapping[str, str]) -> list[TensorMapping]:
    """The tensors that are one leaf each: {our path: Hugging Face's name}."""
    return [TensorMapping(name, (path,)) for path, name in names.items()]


def layer_mappings(names: Mapping[str, str], bare: Container[str]) -> list[TensorMapping]:
    """The weight and bias of each {our layer: Hugging Face's module}, if they are among `bare`, our leaves."""
    pairs = (
        (f"{ours}.{leaf}", f"{hub}.{ending}")
        for ours, hub in names.items()
        for leaf, ending in (("w", "weight"), ("b", "bias"))
    )
    return one_to_one({path: name for path, name in pairs if path in bare})


# --------------------------------------------------------------------------------------------------------- hub to ours


def parameters(tensors: Mapping[str, LazyTensor], cfg: Config, family: Family) -> tuple[dict[str, LazyTensor], Config]:
    """The parameters among a hub's tensors, without the family's prefix, and the config that is true of them.

    Where the config says that head and embedding are one, and the tensors are two that differ (the head was trained by
    itself, and merged), they are two. An equal head is left out, and one alone stands for the embedding.

    Raises InputError if a tensor is there by two names; and as `from_hf` does, before head and embedding are read.
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


def from_hf(
    tensors: Mapping[str, LazyTensor],
    cfg: Config,
    family: Family,
    place: Place = lambda path, x: x,
    rows: Mapping[str, slice] = MappingProxyType({}),
) -> GPT:
    """Our tree of Hugging Face's tensors, each read, split, and given to `place` before the next is read.

    Transposed weights are views: no copy is made.

    A quantized product of q, k and v is split where its blocks, and the blocks of quantized scales, end between them
    (for NF4 with double quantization, where d_model is a multiple of 128); else they stay one, as in
    `fuse_qkv`.

    `tensors` and `cfg` are those that `parameters` returns. Of the leaves in `rows`, matrices, `place` is given these
    rows, and of a tensor that can be read in part, no others are read; but a quantized one is given whole.

    Raises InputError if a tensor is missing, surplus, or of another shape; before anything is read, but for the
    shape of a quantized one.
    """
    bare, table = abstract_params(cfg), {s.name: s for s in family.tensor_mappings(cfg)}
    empty, sizes = leaves(bare), _check_shapes(tensors, cfg, family)

    def read(
        s: TensorMapping,
    ) -> dict[str, Any]:  # a function, so that nothing of one tensor is left when the next is read
        tensor = tensors[s.name]
        if tensor.read_part is not None and all(path in rows for path in s.paths):
            axis = int(s.transposed)
            parts = [tensor.read_part(axis, x) for x in _ranges(s, [rows[p] for p in s.paths], heights(s))]
            _check_floating(s.name, parts[0])
            return {p: place(p, x.T if s.transposed else x) for p, x in zip(s.paths, parts, strict=True)}
        x, size = tensor.read(), sizes[s.name]
        _check_shape(s.name, size[::-1] if s.transposed and not isinstance(x, Tensor) else size, tuple(x.shape))
        _check_floating(s.name, x)
        parts = split(x, s, [tuple(empty[p].shape) for p in s.paths])
        if len(parts) < len(s.paths):
            fused = s.paths[0].removesuffix(".q.w") + ".qkv.w"
            return {fused: place(fused, x)}
        return {path: place(path, some_rows(path, part)) for path, part in zip(s.paths, parts, strict=True)}

    def heights(s: TensorMapping) -> list[int]:
        return [empty[path].shape[0] for path in s.paths]

    def some_rows(path: str, x: Any) -> Any:
        return x[rows[path]] if path in rows and isinstance(x, Tensor) else x

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

    Raises InputError if a tensor is there by both names.
    """
    names = [name for name in tensors if not name.endswith(family.buffers)]
    bare = {name.removeprefix(family.prefix): tensors[name] for name in names}
    if len(bare) < len(names):
        twice = next(name for name in names if name.startswith(family.prefix) and name[len(family.prefix) :] in names)
        raise InputError(f"tensor {twice} is there without {family.prefix} too: expected one of them")
    return bare


def _equal(a: Any, b: Any) -> bool:
    """Whether two matrices have equal elements; False if one is quantized."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wide), b.to(wide))


def _check_shapes(tensors: Mapping[str, LazyTensor], cfg: Config, family: Family) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor of the family has under a config.

    Raises InputError if one is missing, surplus, or of another shape.
    """
    table = {s.name: s for s in family.tensor_mappings(cfg)}
    if missing := [name for name in table if name not in tensors]:
        raise InputError(f"tensor {missing[0]} is missing ({len(missing)} in all): not a whole model of this config")
    if surplus := tensors.keys() - table.keys():
        raise InputError(f"tensor {min(surplus)} has no place in a model of this config ({len(surplus)} in all)")
    sizes = tensor_shapes(cfg, family)
    for name, size in sizes.items():
        _check_shape(name, size, tensors[name].shape)
    return sizes


def tensor_shapes(cfg: Config, family: Family) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a family under a config, by Hugging Face's name without the family's prefix."""
    empty = leaves(abstract_params(cfg))
    shapes: dict[str, tuple[int, ...]] = {}
    for s in family.tensor_mappings(cfg):
        shapes[s.name] = tuple(join_heads([empty[path] for path in s.paths], s).shape)
    return shapes


def _check_floating(name: str, x: Any) -> None:
    if isinstance(x, Tensor) and not x.is_floating_point():  # integers would be codes of an unknown format
        raise InputError(f"tensor {name}: expected a floating dtype, got {str(x.dtype).removeprefix('torch.')}")


def _ranges(s: TensorMapping, rows: Sequence[slice], heights: Sequence[int]) -> list[list[slice]]:
    """Where the given rows of each leaf are in the tensor: along its rows, or its columns if it is transposed.

    >>> fused = TensorMapping("qkv", ("q", "k", "v"))
    >>> _ranges(fused, [slice(2, 4)] * 3, [4, 4, 4])
    [[slice(2, 4, None)], [slice(6, 8, None)], [slice(10, 12, None)]]
    >>> _ranges(replace(fused, heads=2), [slice(1, 4)] * 3, [4, 4, 4])[1]  # q q k k v v, twice
    [slice(3, 4, None), slice(8, 10, None)]
    """
    ranges: list[list[slice]] = []
    for i, part in enumerate(rows):
        if not s.heads:
            begin = sum(heights[:i])
            ranges.append([slice(begin + part.start, begin + part.stop)])
            continue
        size = heights[i] // s.heads
        pieces: list[slice] = []
        for head in range(s.heads):
            begin, stop = max(part.start, head * size), min(part.stop, (head + 1) * size)
            shift = (head * (len(heights) - 1) + i) * size
            pieces += [slice(begin + shift, stop + shift)] if begin < stop else []
        ranges.append(pieces)
    return ranges


def _check_shape(name: str, want: tuple[int, ...], got: tuple[int, ...] | None) -> None:
    if got is not None and got != want:
        raise InputError(f"tensor {name}: expected shape {list(want)}, got {list(got)}")


def _node(tree: Any, path: str) -> Any:
    return dict(walk(tree))[path]


def split(x: Any, s: TensorMapping, sizes: list[tuple[int, ...]]) -> list[Any]:
    """The leaves in a tensor; or the tensor itself if it is quantized and cannot be split."""
    if len(s.paths) == 1:
        return [x.T if s.transposed and isinstance(x, Tensor) else x]
    if isinstance(x, QUANTIZED):
        if s.heads:
            return _heads_apart(x, s)
        return equal_parts(x, len(s.paths)) or [x]
    if s.heads:
        pattern = "(heads part size) ... -> part (heads size) ..."
        return list(rearrange(x, pattern, heads=s.heads, part=len(s.paths)))
    return list((x.T if s.transposed and x.ndim == 2 else x).split([size[0] for size in sizes]))


def join_heads(parts: list[Tensor], s: TensorMapping) -> Tensor:
    """The tensor of the leaves `parts`, as the hub has it."""
    if parts[0].is_meta:  # its shape: torch's `cat` of such tensors imports the compiler, which takes a second
        x = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
        return x.T if s.transposed and not s.heads else x
    if s.heads:
        return rearrange(parts, "part (heads size) ... -> (heads part size) ...", heads=s.heads)
    x = parts[0] if len(parts) == 1 else torch.cat(parts)
    return x.T if s.transposed else x


def _heads_apart(w: Quantized, s: TensorMapping) -> list[Quantized]:
    """q, k and v of rows that alternate by heads, still quantized as they are."""
    if not isinstance(w, RowwiseInt8) and w.shape[1] % BLOCK:
        raise InputError(
            f"tensor {s.name}: q, k and v alternate by heads, and a block of {BLOCK} lies across two rows of "
            f"{w.shape[1]}: quantize a plain one"
        )
    rows = torch.arange(w.shape[0], device=device(w))
    parts = rearrange(rows, "(heads part size) -> part (heads size)", heads=s.heads, part=len(s.paths))
    return [slice_rows(w, part) for part in parts]


def equal_parts(w: Quantized, n: int) -> list[Any] | None:
    """The rows of `w` in n equal parts, still quantized as they are; None if a block lies across two parts."""
    if isinstance(w, Rotated):
        parts = equal_parts(gather_base(w), n)
        return parts and [replace(w, base=part) for part in parts]
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
    """Raises InputError if a part of `params` has not the size that its config gives it."""
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
