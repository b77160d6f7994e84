"""Adapters: small trees of float tensors that a transform lays over a frozen params tree.

    Adapters = {path: LoRA | DoRA | IA3 | Tensor}

A `LoRA`, `DoRA` or `IA3` at the path of a layer adapts that layer; a plain tensor at the path of a leaf replaces that
leaf. LoRA, norm, bias, partial and full tuning are one mechanism, and they compose by dict union:
`lora(.., rank=4, target="..") | lora(.., rank=16, target="..") | trainable_leaves(..)`. The adapters are the one tree
that is differentiated. They do not depend on the format of the base: `lora` over a quantized tree is QLoRA.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.kernels.quantized_linear import QUANTIZED
from fgpt.rng import fold_in, fold_in_seed, seed_tensor
from fgpt.tree import children, device, leaves, node, num_elements, replace_at, select, static, tree_map, walk
from fgpt.weights import Adapted, Weight, dense, row_norms, shape

T = TypeVar("T")
R = TypeVar("R")


@node
class LoRA:
    """W' = W + s·B·A, with s = alpha / rank, or alpha / √rank if rank-stabilized.

    Args:
        a: A, which projects the layer's input to `rank` components. `lora` draws it.
        b: B, which projects them to the layer's output. `lora` sets it to 0.
        alpha: The strength, from which s follows.
        rs: Rank-stabilized scaling: s = alpha / √rank.

    Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023 (rsLoRA), theorem 3.2.

    >>> import fgpt
    >>> x = fgpt.LoRA(a=torch.ones(2, 8), b=torch.zeros(4, 2), alpha=16.0)
    >>> x.scale
    8.0
    """

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    alpha: float = static()
    rs: bool = static(default=False)
    dropout: float = static(default=0.0)
    """Probability of dropping an element of A's input in training, that is, if `adapt` is given a key."""
    scaling: Float[Tensor, ""] | None = None
    """s itself, in place of alpha and the rank: in a stack whose members differ in them. No gradient reaches it."""

    @property
    def scale(self) -> Any:
        """s: a float, or in a stack the member's own as a tensor."""
        if self.scaling is not None:
            return self.scaling.detach()
        rank = self.a.shape[0]
        return self.alpha / (rank**0.5 if self.rs else rank)


@node
class DoRA:
    """W' = m · V / ‖V‖ by row, with V = W + s·B·A: magnitude m, direction V. The gradient takes ‖V‖ as a constant.

    Args:
        lora: The update of the direction.
        m: The magnitude of each row, that is of each output. `dora` sets it to ‖W‖ by row.

    Source: Liu et al. 2024 (DoRA), sections 4.1 and 4.3.

    >>> import fgpt
    >>> base = {"layer": fgpt.model.Linear(torch.eye(2))}
    >>> update = fgpt.LoRA(torch.ones(1, 2), torch.zeros(2, 1), alpha=1.0)
    >>> adapted = fgpt.adapt(base, {"layer": fgpt.DoRA(update, m=torch.tensor([3.0, 5.0]))})
    >>> fgpt.dense(adapted["layer"].w)
    tensor([[3., 0.],
            [0., 5.]])
    """

    lora: LoRA
    m: Float[Tensor, " out"]


@node
class IA3:
    """W' = diag(row) · W · diag(col), and bias' = row ⊙ bias: outputs rescaled, or inputs.

    Args:
        row: The factor of each output; None scales no outputs.
        col: The factor of each input; None scales no inputs.

    Source: Liu et al. 2022 (IA3), section 3.3.

    >>> import fgpt
    >>> base = {"layer": fgpt.model.Linear(torch.eye(2))}
    >>> adapted = fgpt.adapt(base, {"layer": fgpt.IA3(row=torch.tensor([3.0, 5.0]))})
    >>> fgpt.dense(adapted["layer"].w)
    tensor([[3., 0.],
            [0., 5.]])
    """

    row: Float[Tensor, " out"] | None = None
    col: Float[Tensor, " in"] | None = None


Adapter: TypeAlias = LoRA | DoRA | IA3 | Tensor
Adapters: TypeAlias = dict[str, Adapter]


# ------------------------------------------------------------------------------------------------------- construction


def adaptable_layers(params: Any) -> dict[str, Any]:
    """The layers of `params` that can be adapted, by path: nodes whose field `w` is a weight matrix."""
    return {path: x for path, x in walk(params) if not isinstance(x, Tensor | Adapted) and _has_weight_matrix(x)}


def _has_weight_matrix(layer: Any) -> bool:
    w = getattr(layer, "w", None)
    return isinstance(w, (Adapted, *QUANTIZED)) or (isinstance(w, Tensor) and w.ndim == 2)


def weight_matrices(params: Any) -> dict[str, Weight]:
    """The weight matrices of `params` by the path of their layer."""
    return {path: layer.w for path, layer in adaptable_layers(params).items()}


def lora(
    params: Any,
    rng: torch.Generator,
    rank: int = 8,
    alpha: int | float | None = None,
    target: str = r"blocks\..*\.(q|k|v|qkv)",
    rs: bool = False,
    dropout: float = 0.0,
) -> Adapters:
    r"""A fresh LoRA on every layer whose path matches `target`, in fp32. B = 0, so it begins as the identity; A is
    uniform in ±1/√in (Kaiming, as in the paper's code).

    Args:
        params: The base, quantized or not.
        rng: A key: each A is drawn from fold_in(rng, path).
        rank: Rows of A and columns of B.
        alpha: The strength: s = alpha / rank, or alpha / √rank if `rs`. None means s = 2.
        target: A regular expression that matches a layer's path in full.
        rs: Rank-stabilized scaling.
        dropout: Probability of dropping an element of A's input in training.

    Raises:
        InputError: if `target` matches nothing, `rank` exceeds the smaller side of a layer, or `dropout` is not in
            [0, 1).

    Source: Hu et al. 2021 (LoRA), section 4.1; Kalajdzievski 2023 (rsLoRA), theorem 3.2.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> list(fgpt.lora(params, fgpt.key(1), rank=2, target=r"blocks\..*\.(q|v)"))
    ['blocks.0.attn.q', 'blocks.0.attn.v']
    """
    if not 0 <= dropout < 1:
        raise InputError(f"dropout {dropout}: expected a probability from 0 to less than 1")
    weights = weight_matrices(params)
    adapters: Adapters = {}
    for path in select(weights, target):
        out, inp = shape(weights[path])
        if not 1 <= rank <= min(out, inp):
            raise InputError(
                f"rank {rank} on {path}: expected 1 to {min(out, inp)}, the smaller side of [{out}, {inp}]"
            )
        where, bound = device({path: weights[path]}), inp**-0.5
        a = torch.empty(rank, inp, dtype=torch.float32).uniform_(-bound, bound, generator=fold_in(rng, path))
        b = torch.zeros(out, rank, dtype=torch.float32)
        strength = 2 * (rank**0.5 if rs else rank) if alpha is None else alpha
        adapters[path] = LoRA(a.to(where), b.to(where), float(strength), rs, dropout)
    return adapters


def dora(
    params: Any,
    rng: torch.Generator,
    rank: int = 8,
    alpha: int | float | None = None,
    target: str = r"blocks\..*\.(q|k|v|qkv)",
    dropout: float = 0.0,
) -> Adapters:
    """A fresh DoRA on every layer whose path matches `target`: a fresh LoRA, and m = ‖W‖ by row, so that it begins as
    the identity, to the bit.

    Args:
        params: The base, quantized or not.
        rng: A key: each A is drawn from fold_in(rng, path).
        rank: Rows of A and columns of B.
        alpha: The strength: s = alpha / rank. None means s = 2.
        target: A regular expression that matches a layer's path in full.
        dropout: Probability of dropping an element of A's input in training.

    Raises:
        InputError: as `lora` does.

    Source: Liu et al. 2024 (DoRA), section 4.1.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> fgpt.dora(params, fgpt.key(1), rank=2)["blocks.0.attn.q"].m.shape
    torch.Size([8])
    """
    weights, adapters = weight_matrices(params), lora(params, rng, rank, alpha, target, dropout=dropout)
    return {p: DoRA(x, row_norms(weights[p], x.a, x.b, x.scale)) for p, x in adapters.items() if isinstance(x, LoRA)}


def ia3(
    params: Any, rows: str | None = r"blocks\..*\.attn\.(k|v|qkv)", cols: str | None = r"blocks\..*\.mlp\.down"
) -> Adapters:
    """A fresh IA3 of ones on linear layers, which begins as the identity.

    Args:
        params: The base, quantized or not.
        rows: A regular expression for the layers whose outputs are scaled: by default keys and values, as in the
            paper; of a fused product, all of it. None scales no outputs.
        cols: A regular expression for the layers whose inputs are scaled. None scales no inputs.

    Raises:
        InputError: if a pattern matches nothing, or something that is not a linear layer.

    Source: Liu et al. 2022 (IA3), section 3.3.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> list(fgpt.ia3(fgpt.init(cfg, fgpt.key(0))))
    ['blocks.0.attn.k', 'blocks.0.attn.v', 'blocks.0.mlp.down']
    """
    layers = adaptable_layers(params)

    def ones(pattern: str | None, side: int) -> dict[str, Tensor]:
        scales: dict[str, Tensor] = {}
        for path in select(layers, pattern) if pattern else ():
            if not hasattr(layers[path], "b"):
                raise InputError(f"IA3 on {path}: expected a linear layer, got {type(layers[path]).__name__}")
            w = layers[path].w
            scales[path] = torch.ones(shape(w)[side], dtype=torch.float32, device=device({path: w}))
        return scales

    row, col = ones(rows, 0), ones(cols, 1)
    return {path: IA3(row.get(path), col.get(path)) for path in row | col}


def trainable_leaves(params: Any, target: str = ".*") -> Adapters:
    r"""The leaves themselves as the trainable tree, in fp32 (fp64 stays).

    Args:
        params: The base.
        target: A regular expression that matches a leaf's path in full: `".*ln_.*"` tunes norms, `r".*\.b"` biases,
            `".*"` everything.

    Raises:
        InputError: if `target` matches nothing, or a part of a quantized weight.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> list(fgpt.trainable_leaves(fgpt.init(cfg, fgpt.key(0)), "ln_f.*"))
    ['ln_f.w', 'ln_f.b']
    """
    tensors = leaves(params)
    quantized = [path for path, x in walk(params) if isinstance(x, QUANTIZED)]
    chosen = select(tensors, target)
    for path in chosen:
        if parents := [q for q in quantized if path.startswith(f"{q}.")]:
            raise InputError(f"cannot tune {parents[0]}, which is quantized: narrow the target, or tune, then quantize")
    return {path: at_least_fp32(tensors[path]) for path in chosen}


# -------------------------------------------------------------------------------------------- each kind: Layer -> Layer


def lora_layer(layer: Any, x: LoRA, path: str, seed: Int[Tensor, ""] | None) -> Any:
    """W' = W + s·B·A."""
    _check_low_rank(path, x, layer.w)
    b, scale = _scaled_b(x)
    dropout = x.dropout if seed is not None else 0.0
    return replace(layer, w=Adapted(layer.w, x.a, b, seed=seed if dropout else None, scale=scale, dropout=dropout))


def dora_layer(layer: Any, x: DoRA, path: str, seed: Int[Tensor, ""] | None) -> Any:
    """W' = m · V / ‖V‖ by row, with V = W + s·B·A: LoRA's layer, and row = m / ‖V‖."""
    adapted = lora_layer(layer, x.lora, path, seed)
    rows, _ = shape(layer.w)
    if x.m.shape[0] != rows:
        raise InputError(f"DoRA at {path} has {x.m.shape[0]} magnitudes, but the base has {rows} rows")
    b, scale = _scaled_b(x.lora)
    w = tree_map(torch.detach, layer.w)  # the norms are a constant to every derivative
    norms = row_norms(w, x.lora.a.detach(), b.detach(), scale)
    return replace(adapted, w=replace(adapted.w, row=x.m / norms.clamp(min=1e-30)))


def ia3_layer(layer: Any, x: IA3, path: str, seed: Int[Tensor, ""] | None) -> Any:
    """W' = diag(row) · W · diag(col), bias' = row ⊙ bias."""
    for scale, size in zip((x.row, x.col), shape(layer.w), strict=True):
        if scale is not None and scale.shape[0] != size:
            raise InputError(f"IA3 at {path} scales {scale.shape[0]} components, but the base has {size}")
    adapted, bias = replace(layer, w=Adapted(layer.w, row=x.row, col=x.col)), getattr(layer, "b", None)
    if x.row is None or bias is None:
        return adapted
    return replace(adapted, b=(x.row * bias).to(bias.dtype))


LAYER_TRANSFORMS: dict[type, Callable[..., Any]] = {LoRA: lora_layer, DoRA: dora_layer, IA3: ia3_layer}
"""What each kind of adapter makes of a layer: (layer, adapter, path, seed of dropout or None) -> layer."""


def _scaled_b(x: LoRA) -> tuple[Tensor, float]:
    """(B, s), or (s·B, 1) in a stack, whose s is a tensor."""
    return (x.scale * x.b, 1.0) if isinstance(x.scale, Tensor) else (x.b, x.scale)


def _check_low_rank(path: str, x: LoRA, w: Weight) -> None:
    if x.a.shape[0] != x.b.shape[1]:
        raise InputError(f"adapter at {path} has A of rank {x.a.shape[0]}, but B of rank {x.b.shape[1]}")
    size = (x.b.shape[0], x.a.shape[1])
    if size != shape(w):
        raise InputError(f"adapter at {path} fits a weight of {list(size)}, but the base has {list(shape(w))}")


# ---------------------------------------------------------------------------------------------------------- application


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
        params = _replace_leaves(_with_own_head(params, tree), tree)
        layers, adapted = adaptable_layers(params), {}
        for path, x in tree.items():
            if isinstance(x, Tensor):
                continue
            if path not in layers:
                raise InputError(f"no layer '{path}' to adapt; {_hint(path, layers)}")
            seed = None if key_seed is None else fold_in_seed(key_seed, f"{number}/{path}")
            adapted[path] = LAYER_TRANSFORMS[type(x)](layers[path], x, path, seed)
        params = replace_at(params, adapted)
    return params


def _replace_leaves(params: T, tree: Mapping[str, Any]) -> T:
    """`params` with the leaves that `tree` trains itself, rounded to the dtype that they are computed in."""
    tensors = {path: x for path, x in tree.items() if isinstance(x, Tensor)}
    if not tensors:
        return params
    base = leaves(params)
    for path, x in tensors.items():
        if path not in base:
            raise InputError(f"no leaf '{path}' to replace; {_hint(path, base)}")
        if x.shape != base[path].shape:
            got, expected = list(x.shape), list(base[path].shape)
            raise InputError(f"tensor at {path} has shape {got}, but the base has {expected}")
    return replace_at(params, {path: x.to(base[path].dtype) for path, x in tensors.items()})


def _with_own_head(params: T, tree: Mapping[str, Any]) -> T:
    """`params` with a head of its own, if `tree` adapts the head of a tied model."""
    untie = getattr(params, "untie", None)
    if untie is None or not any(path in ("head", "head.w") for path in tree) or "head" in dict(children(params)):
        return params
    table = {path: x for path, x in tree.items() if path == "wte.w"}
    return adapt(params, table).untie()  # pyright: ignore[reportAttributeAccessIssue]


def _hint(path: str, paths: Mapping[str, Any]) -> str:
    if path.endswith(".qkv") and path[:-3] + "q" in paths:
        return "this adapter is for a fused base: fuse_qkv(params) first"
    if path[-1:] in "qkv" and path[:-1] + "qkv" in paths:
        return "this adapter is for a base that is not fused: do not fuse_qkv(params)"
    return f"the base has {', '.join(list(paths)[:4])} .."


def merge(params: T, base: Any = None) -> T:
    """A plain tree again: every adapted weight becomes the one matrix it means.

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
    weights = {path: x for path, x in walk(params) if isinstance(x, (Adapted, *QUANTIZED))}
    outermost = {p: w for p, w in weights.items() if not any(p.startswith(f"{q}.") for q in weights)}
    if isinstance(base, str):
        return replace_at(params, {p: dense(w) for p, w in outermost.items()})
    if base is None:
        quantized = [p for p, w in outermost.items() if isinstance(_base_weight(w), QUANTIZED)]
        if adapted := [p for p in quantized if isinstance(outermost[p], Adapted)]:
            raise InputError(
                f'{adapted[0]} has a quantized base: merge(params, base="dequantized"), or base=the original params'
            )
        return replace_at(params, {p: dense(w) for p, w in outermost.items() if p not in quantized})
    original = {path: x for path, x in walk(base) if path in outermost}
    if missing := [p for p, w in outermost.items() if p not in original or shape(original[p]) != shape(w)]:
        raise InputError(f"{missing[0]} is not in the params given as base, or has another shape there")
    return replace_at(params, {p: dense(_with_base(w, original[p])) for p, w in outermost.items()})


def _base_weight(w: Weight) -> Weight:
    return _base_weight(w.base) if isinstance(w, Adapted) else w


def _with_base(w: Weight, base: Weight) -> Weight:
    return replace_at(w, {"base": _with_base(w.base, base)}) if isinstance(w, Adapted) else base


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
    """The number of trained elements: counted on the tree itself, without the constants of a stack.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> fgpt.num_trainable(fgpt.lora(fgpt.init(cfg, fgpt.key(0)), fgpt.key(1), rank=2))  # q, k, v: 2 * (8 + 8) each
    96
    """
    constants = [x.scaling for _, x in walk(adapters) if isinstance(x, LoRA)]
    return num_elements(adapters) - sum(x.numel() for x in constants if x is not None)
