"""Adapters: small trees of float tensors that a transform lays over a frozen params tree.

    Adapters = {path: LoRA | DoRA | IA3 | VeRA | TrainableTokens | Tensor}      adapted params = adapt(params, adapters)

A `LoRA`, `DoRA`, `IA3`, `VeRA` or `TrainableTokens` at the path of a layer adapts it; a plain tensor at the path
of a leaf replaces that leaf. LoRA, norm, bias, partial and full tuning are one mechanism, and compose by dict union:
`lora(.., rank=4, target="..") | lora(.., rank=16, target="..") | trainable_leaves(..)`. The adapters are the one tree
that is differentiated. They do not depend on the format of the base: `lora` over a quantized tree is QLoRA.

Each kind is a file, `fgpt.adapter_lora` and so on: a node with one method, `adapt_layer`, from layer to layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.adapter_dora import DoRA
from fgpt.adapter_lora import LoRA
from fgpt.adapter_types import Adapters
from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.kernels.quantized_linear import FROZEN, Rotated, is_quantized
from fgpt.kernels.sharded_matrix import Sharded, split_rows
from fgpt.kernels.sharded_parameter import ShardedParameter
from fgpt.layers import adaptable_layers, is_adaptable
from fgpt.rng import fold_in_seed, seed_tensor
from fgpt.tree import children, get_at, leaves, num_elements, replace_at, select, walk
from fgpt.weights import Adapted, Weight, dense, shape

T = TypeVar("T")
R = TypeVar("R")

LEAVES = (Tensor, ShardedParameter)
"""What replaces a leaf of the base, where an adapter adapts a layer."""


def adapt(params: T, *adapters: Mapping[str, Any], rng: torch.Generator | Int[Tensor, ""] | None = None) -> T:
    """`params` with each of `adapters` laid over it in turn. Only the paths of adapters are rebuilt, and nothing is
    multiplied but for the row norms of DoRA.

    Within one tree tensors come first: an adapter lies on the weight that the tree itself puts there. A tree that
    adapts the head of a tied model makes it a layer of its own, which begins as the tree's embedding table.

    Args:
        params: The base, quantized or not, or an adapted tree.
        adapters: Trees of adapters, the innermost first.
        rng: A key or its seed, which turns dropout on. Under vmap one key gives every member the same masks, and a
            mapped seed, such as `fold_in(key, i)` of a mapped i, gives each its own.

    Raises:
        InputError: if a path or a shape does not fit the params.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> adapted = fgpt.adapt(params, fgpt.lora(params, fgpt.key(1), rank=2))
    >>> type(adapted.blocks[0].attn.q.w).__name__
    'Adapted'
    """
    key_seed = None if rng is None else seed_tensor(rng)
    for number, tree in enumerate(adapters):
        params = _replace_leaves(own_head(params, tree), tree)
        adapted: dict[str, Any] = {}
        for path, x in tree.items():
            if isinstance(x, LEAVES):
                continue
            layer = get_at(params, path)
            if not is_adaptable(layer):
                raise InputError(f"no layer '{path}' to adapt; {_hint(path, adaptable_layers(params))}")
            seed = None if key_seed is None else fold_in_seed(key_seed, f"{number}/{path}")
            adapted[path] = x.adapt_layer(layer, path, seed)
        params = replace_at(params, adapted)
    return params


def _replace_leaves(params: T, tree: Mapping[str, Any]) -> T:
    """`params` with the leaves that `tree` trains itself, rounded to the dtype that they are computed in."""
    trained = {path: x for path, x in tree.items() if isinstance(x, LEAVES)}
    if not trained:
        return params
    new: dict[str, Tensor | ShardedParameter] = {}
    for path, x in trained.items():
        old = get_at(params, path)
        if not isinstance(old, LEAVES) and not (isinstance(old, Sharded) and isinstance(old.part, Tensor)):
            raise InputError(f"no leaf '{path}' to replace; {_hint(path, leaves(params))}")
        if x.shape != old.shape:
            got, expected = list(x.shape), list(old.shape)
            raise InputError(f"tensor at {path} has shape {got}, but the base has {expected}")
        new[path] = x.to(old.dtype) if isinstance(x, Tensor) else replace(x, dtype=old.dtype)
    return replace_at(params, new)


def own_head(params: T, tree: Mapping[str, Any]) -> T:
    """`params` with a head of its own, if `tree` adapts the head of a tied model."""
    untie = getattr(params, "untie", None)
    if untie is None or not any(path in ("head", "head.w") for path in tree) or "head" in dict(children(params)):
        return params
    table = {path: x for path, x in tree.items() if path == "wte.w"}
    return adapt(params, table).untie()  # pyright: ignore[reportAttributeAccessIssue]


def dora_norms(params: Any, adapters: Adapters) -> dict[str, Float[Tensor, " out"]]:
    """‖V‖ by row of each DoRA in `adapters` over `params`, by its path; of weights that `adapters` replace, as `adapt`
    replaces them.

    They change only with the update: a step of several micro-batches computes them once, by
    `make_step(.., prepare=..)`, and gives them to each by `with_norms`.

    >>> import fgpt
    >>> base = {"layer": fgpt.model.Linear(torch.eye(2))}
    >>> update = fgpt.LoRA(torch.ones(1, 2), torch.zeros(2, 1), alpha=1.0)
    >>> dora_norms(base, {"layer": fgpt.DoRA(update, m=torch.tensor([3.0, 5.0]))})
    {'layer': tensor([1., 1.])}
    """
    doras = {path: x for path, x in adapters.items() if isinstance(x, DoRA)}
    replaced = {path: x for path, x in adapters.items() if path.removesuffix(".w") in doras and isinstance(x, LEAVES)}
    params = _replace_leaves(own_head(params, adapters), replaced)
    return {path: x.direction_norms(get_at(params, path).w) for path, x in doras.items()}


def _hint(path: str, paths: Mapping[str, Any]) -> str:
    if path.endswith(".qkv") and path[:-3] + "q" in paths:
        return "this adapter is for a fused base: fuse_qkv(params) first"
    if path[-1:] in "qkv" and path[:-1] + "qkv" in paths:
        return "this adapter is for a base that is not fused: do not fuse_qkv(params)"
    return f"the base has {', '.join(list(paths)[:4])} .."


def merge(params: T, base: Any = None) -> T:
    """A plain tree again: every adapted weight becomes the one matrix it means. Over a sharded base it is in parts.

    Over a quantized base there are two answers, and `base` chooses: "dequantized" adds the adapters to the values that
    they were trained on; the original params tree adds them to the values before quantization, which they have never
    seen. Neither is the model that was trained once it is rounded to half precision or quantized again:
    `fgpt.compare_outputs` measures the difference.

    Args:
        params: An adapted tree.
        base: None, "dequantized", or the params tree that was quantized.

    Raises:
        InputError: if an adapter lies over a quantized weight and `base` is not given, or if `base` does not fit.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> merged = fgpt.merge(fgpt.adapt(params, fgpt.lora(params, fgpt.key(1), rank=2)))
    >>> torch.equal(merged.blocks[0].attn.q.w, params.blocks[0].attn.q.w)  # a fresh LoRA is the identity
    True
    """
    if isinstance(base, str) and base != "dequantized":
        raise InputError(f'merge with base {base!r}: expected "dequantized" or a params tree')
    weights = {path: x for path, x in walk(params) if isinstance(x, (Adapted, *FROZEN))}
    outermost = {p: w for p, w in weights.items() if not any(p.startswith(f"{q}.") for q in weights)}
    adapted = {p: w for p, w in outermost.items() if isinstance(w, Adapted)}
    quantized = {p: w for p, w in outermost.items() if is_quantized(_base_weight(w))}
    if isinstance(base, str):
        return replace_at(params, {p: _merge_weight(w) for p, w in (adapted | quantized).items()})
    if base is None:
        if both := [p for p in adapted if p in quantized]:
            raise InputError(
                f'{both[0]} has a quantized base: merge(params, base="dequantized"), or base=the original params'
            )
        return replace_at(params, {p: _merge_weight(w) for p, w in adapted.items()})
    original = {path: x for path, x in walk(base) if path in outermost}
    if missing := [p for p, w in outermost.items() if p not in original or shape(original[p]) != shape(w)]:
        raise InputError(f"{missing[0]} is not in the params given as base, or has another shape there")
    return replace_at(params, {p: _merge_weight(w, original[p]) for p, w in outermost.items()})


def _merge_weight(w: Weight, original: Weight | None = None) -> Tensor | Sharded:
    """The matrix that `w` means, over another base if one is given; sharded as that of `w` is."""
    base, merged = _base_weight(w), dense(w if original is None else _with_base(w, original))
    base = base.base if isinstance(base, Rotated) else base
    if isinstance(base, ShardedParameter):
        return split_rows(merged, base.rank, base.size)
    if not isinstance(base, Sharded):
        return merged
    return replace(split_rows(merged, base.rank, base.size), gathers=base.gathers)


def _base_weight(w: Weight) -> Weight:
    return _base_weight(w.base) if isinstance(w, Adapted) else w


def _with_base(w: Weight, base: Weight) -> Weight:
    return replace_at(w, {"base": _with_base(w.base, base)}) if isinstance(w, Adapted) else base


def trainable_leaves(params: Any, target: str = ".*") -> Adapters:
    r"""The leaves themselves as the trainable tree, in fp32 (fp64 stays). Of a matrix that `shard` has put in parts
    each process trains its own: parameters, gradients and moments of all are held once.

    Args:
        params: The base.
        target: A regular expression that matches a leaf's path in full: `".*ln_.*"` tunes norms, `r".*\.b"` biases,
            `".*"` everything.

    Raises:
        InputError: if `target` matches nothing, a quantized weight, or one whose products gather outputs.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> list(fgpt.trainable_leaves(fgpt.init(cfg, fgpt.key(0)), "ln_f.*"))
    ['ln_f.w', 'ln_f.b']
    """
    frozen = {path: x for path, x in walk(params) if isinstance(x, FROZEN)}
    in_parts: dict[str, Sharded | ShardedParameter] = {}
    for path, x in walk(params):
        if isinstance(x, ShardedParameter) or (isinstance(x, Sharded) and isinstance(x.part, Tensor)):
            in_parts[path] = x
    tensors: dict[str, Tensor] = {}
    for path, x in leaves(params).items():
        matrix = path.removesuffix(".part")
        tensors[matrix if matrix in in_parts else path] = x
    trained: Adapters = {}
    for path in select(tensors, target):
        if parents := [q for q in frozen if path.startswith(f"{q}.")]:
            raise InputError(f"cannot tune {parents[0]}, which is quantized: narrow the target, or tune, then quantize")
        x, sharded = at_least_fp32(tensors[path]), in_parts.get(path)
        if isinstance(sharded, Sharded) and sharded.gathers == "outputs":
            raise InputError(f"cannot tune {path}, whose products gather outputs: narrow the target, or use shard")
        trained[path] = x if sharded is None else _parameter(sharded, x)
    return trained


def _parameter(w: Sharded | ShardedParameter, part: Float[Tensor, "rows in"]) -> ShardedParameter:
    """The trained form of a matrix in parts."""
    return ShardedParameter(part, w.out, w.rank, w.size, part.dtype)


def functional_call(fn: Callable[..., R], trees: tuple[Any, ...], *args: Any) -> R:
    """fn(adapt(params, *adapters), *args) for trees = (params, *adapters): torch.func.functional_call for adapters.

    Args:
        fn: A function whose first argument is a params tree, such as `apply`.
        trees: The params, and the trees of adapters over them, the innermost first.
        args: The other arguments of `fn`.

    Raises:
        InputError: as `adapt` does.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> adapters = fgpt.lora(params, fgpt.key(1), rank=2)
    >>> fgpt.functional_call(fgpt.apply, (params, adapters), torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 10])
    """
    params, *adapters = trees
    return fn(adapt(params, *adapters), *args)


def num_trainable(adapters: Adapters) -> int:
    """The number of trained elements: counted on the tree itself, without the constants of a stack,
    and of a matrix in parts on the whole.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> adapters = fgpt.lora(fgpt.init(cfg, fgpt.key(0)), fgpt.key(1), rank=2, target=".*(q|k|v)")
    >>> fgpt.num_trainable(adapters)  # 2 * (8 + 8) each
    96
    """
    total = num_elements(adapters)
    for _, x in walk(adapters):
        if isinstance(x, LoRA) and x.scaling is not None:
            total -= x.scaling.numel()
        elif isinstance(x, ShardedParameter):
            total += x.shape.numel() - x.part.numel()
    return total
