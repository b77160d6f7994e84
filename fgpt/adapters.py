"""Adapters: small trees of float tensors that a transform lays over a frozen params tree.

    Adapters = {path: LoRA | DoRA | IA3 | Tensor}

A `LoRA`, `DoRA` or `IA3` at the path of a layer adapts its weight; a plain tensor at the path of a leaf replaces that
leaf. LoRA, norm, bias, partial and full tuning are one mechanism, and they compose by dict union:
`lora(.., rank=4, target="..") | lora(.., rank=16, target="..") | tune(..)`. The adapters are the one tree that is
differentiated. What the base is made of, fp32 or 4-bit, they never ask: `lora` over a quantized tree is QLoRA.
"""

from collections.abc import Callable, Mapping
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
    """W' = W + s·B·A, with s = alpha / rank, or alpha / √rank where rank-stabilised.

    Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023 (rsLoRA), theorem 3.2.
    """

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    alpha: float = static()
    rs: bool = static(default=False)
    dropout: float = static(default=0.0)
    """Probability that a component of the input of A is dropped while training: where `adapt` is given a key."""
    scaling: Float[Tensor, ""] | None = None
    """s itself, in place of alpha and the rank's: in a `stack` whose members differ in them. No gradient reaches it."""

    @property
    def scale(self) -> Any:
        """s: a number, or in a stack the member's own, a tensor."""
        if self.scaling is not None:
            return self.scaling.detach()
        rank = self.a.shape[0]
        return self.alpha / (rank**0.5 if self.rs else rank)


@node
class DoRA:
    """W' = m · V / ‖V‖ by row, with V = W + s·B·A: magnitude and direction apart. The gradient takes ‖V‖ as a constant.

    Source: Liu et al. 2024 (DoRA), sections 4.1 and 4.3.
    """

    lora: LoRA
    m: Float[Tensor, " out"]


@node
class IA3:
    """W' = diag(row) · W · diag(col), and bias' = row ⊙ bias: outputs rescaled, or inputs.

    Source: Liu et al. 2022 (IA3), section 3.3.
    """

    row: Float[Tensor, " out"] | None = None
    col: Float[Tensor, " in"] | None = None


Adapter: TypeAlias = LoRA | DoRA | IA3 | Tensor
Adapters: TypeAlias = dict[str, Adapter]


# ------------------------------------------------------------------------------------------------------------- making


def weight_matrices(params: Any) -> dict[str, Weight]:
    """The weight matrices of `params` by the path of the layer that holds them: what can be adapted."""
    found = ((path, getattr(x, "w", None)) for path, x in walk(params) if not isinstance(x, Tensor | Adapted))
    return {
        path: w for path, w in found if isinstance(w, (Adapted, *QUANTIZED)) or (isinstance(w, Tensor) and w.ndim == 2)
    }


def lora(
    params: Any,
    rng: torch.Generator,
    rank: int = 8,
    alpha: int | float | None = None,
    target: str = r"blocks\..*\.(q|k|v|qkv)",
    rs: bool = False,
    dropout: float = 0.0,
) -> Adapters:
    """A fresh LoRA on every layer whose path matches `target` in full: B = 0, so that it begins as the identity, and A
    uniform in ±1/sqrt(in) (Kaiming, as in the paper's code). `alpha` is 2·rank unless given, and 2·√rank where
    rank-stabilised (`rs`). Adapters are fp32.

    Raises InputError where `target` matches nothing, `rank` exceeds a layer's smaller side, or `dropout` is not in
    [0, 1).
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
        at, most = device({path: weights[path]}), inp**-0.5
        a = torch.empty(rank, inp, dtype=torch.float32).uniform_(-most, most, generator=fold_in(rng, path))
        b = torch.zeros(out, rank, dtype=torch.float32)
        strength = 2 * (rank**0.5 if rs else rank) if alpha is None else alpha
        adapters[path] = LoRA(a.to(at), b.to(at), float(strength), rs, dropout)
    return adapters


def dora(
    params: Any,
    rng: torch.Generator,
    rank: int = 8,
    alpha: int | float | None = None,
    target: str = r"blocks\..*\.(q|k|v|qkv)",
    dropout: float = 0.0,
) -> Adapters:
    """A fresh DoRA on every layer whose path matches `target` in full: a fresh LoRA, and m = ‖W‖ by row, so that it
    begins as the identity, to the bit.

    Raises InputError as `lora` does.
    """
    weights, adapters = weight_matrices(params), lora(params, rng, rank, alpha, target, dropout=dropout)
    return {p: DoRA(x, row_norms(weights[p], x.a, x.b, x.scale)) for p, x in adapters.items() if isinstance(x, LoRA)}


def ia3(
    params: Any, rows: str | None = r"blocks\..*\.attn\.(k|v|qkv)", cols: str | None = r"blocks\..*\.mlp\.down"
) -> Adapters:
    """A fresh IA3 of ones: on the outputs of the layers whose path matches `rows` in full (the paper's keys and values;
    of a fused product, all of it), and on the inputs of those that match `cols`.

    Raises InputError where a selector matches nothing, or something that is no linear layer.
    """
    weights, nodes = weight_matrices(params), dict(walk(params))
    adapters: Adapters = {}
    for side, target in enumerate((rows, cols)):
        for path in select(weights, target) if target else ():
            if not hasattr(nodes[path], "b"):
                raise InputError(f"IA3 on {path}: expected a linear layer, got {type(nodes[path]).__name__}")
            ones = torch.ones(shape(weights[path])[side], dtype=torch.float32, device=device({path: weights[path]}))
            had = adapters.get(path)
            adapters[path] = IA3(ones) if side == 0 else IA3(had.row if isinstance(had, IA3) else None, ones)
    return adapters


def trainable_leaves(params: Any, target: str = ".*") -> Adapters:
    r"""The leaves themselves, in fp32 (fp64 stays), as the trainable tree: `".*ln_.*"` tunes norms, `r".*\.b"` biases,
    `".*"` all.

    Raises InputError where `target` matches nothing, or a part of a quantized weight.
    """
    found, held = leaves(params), [path for path, x in walk(params) if isinstance(x, QUANTIZED)]
    chosen = select(found, target)
    for path in chosen:
        if inside := [q for q in held if path.startswith(f"{q}.")]:
            raise InputError(f"cannot tune {inside[0]}, which is quantized: narrow the target, or tune, then quantize")
    return {path: at_least_fp32(found[path]) for path in chosen}


# ------------------------------------------------------------------------------------------------------------ applying


def adapt(params: T, *adapters: Mapping[str, Any], rng: torch.Generator | Int[Tensor, ""] | None = None) -> T:
    """`params` with each of `adapters` laid over it in turn. Only touched paths are rebuilt; nothing is multiplied,
    but for the row norms of DoRA. `rng`, a key or its seed, turns dropout on. Under vmap one
    key gives every member the same masks, and a mapped seed, such as `fold_in(key, i)` of a mapped i, one's own.

    Within one tree tensors come first: an adapter lies on the weight that the tree itself puts there. A tree that
    adapts the head of a tied model makes it a layer of its own, which begins as the tree's embedding table.

    Raises InputError where a path or a shape does not fit the params.
    """
    draw = None if rng is None else seed_tensor(rng)
    for number, tree in enumerate(adapters):
        params = _untie(params, tree)
        new = {path: x for path, x in tree.items() if isinstance(x, Tensor)}
        tensors = leaves(params) if new or any(isinstance(x, IA3) for x in tree.values()) else {}
        for path, x in new.items():
            if path not in tensors:
                raise InputError(f"no leaf '{path}' to replace; {_nearest(path, tensors)}")
            if x.shape != tensors[path].shape:
                got, has = list(x.shape), list(tensors[path].shape)
                raise InputError(f"tensor at {path} has shape {got}, but the base has {has}")
        # What is computed in the base's dtype is trained in fp32: a trained leaf is rounded where it is laid.
        new = {path: x.to(tensors[path].dtype) for path, x in new.items()}
        params, tensors = replace_at(params, new), tensors | new
        weights, changed = weight_matrices(params), {}
        for path, x in tree.items():
            if isinstance(x, Tensor):
                continue
            if path not in weights:
                raise InputError(f"no layer '{path}' to adapt; {_nearest(path, weights)}")
            _check(path, x, weights[path])
            own = None if draw is None else fold_in_seed(draw, f"{number}/{path}")
            changed[f"{path}.w"] = _adapted_weight(weights[path], x, own)
            bias = tensors.get(f"{path}.b")
            if isinstance(x, IA3) and x.row is not None and bias is not None:
                changed[f"{path}.b"] = (x.row * bias).to(bias.dtype)
        params = replace_at(params, changed)
    return params


def _untie(params: T, tree: Mapping[str, Any]) -> T:
    """`params` with a head of its own, where `tree` adapts the head of a tied model."""
    untied = getattr(params, "untied", None)
    if untied is None or not any(path in ("head", "head.w") for path in tree) or "head" in dict(children(params)):
        return params
    table = {path: x for path, x in tree.items() if path == "wte.w"}
    return adapt(params, table).untied()  # pyright: ignore[reportAttributeAccessIssue]


def _adapted_weight(w: Weight, x: LoRA | DoRA | IA3, draw: Int[Tensor, ""] | None) -> Adapted:
    """`w` under an adapter, in the normal form of the family."""
    if isinstance(x, IA3):
        return Adapted(w, row=x.row, col=x.col)
    v = x.lora if isinstance(x, DoRA) else x
    b, scale = (v.scale * v.b, 1.0) if isinstance(v.scale, Tensor) else (v.b, v.scale)
    row = x.m / _detached_row_norms(w, v.a, b, scale) if isinstance(x, DoRA) else None
    drops = draw is not None and v.dropout > 0
    return Adapted(w, v.a, b, row, seed=draw if drops else None, scale=scale, dropout=v.dropout if drops else 0.0)


def _detached_row_norms(
    w: Weight, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"], scale: float
) -> Float[Tensor, " out"]:
    """‖V‖ by row, a constant to every derivative."""
    return row_norms(tree_map(torch.detach, w), a.detach(), b.detach(), scale).clamp(min=1e-30)


def _check(path: str, x: LoRA | DoRA | IA3, w: Weight) -> None:
    out, inp = shape(w)
    if isinstance(x, IA3):
        sides = [(s.shape[0], has) for s, has in ((x.row, out), (x.col, inp)) if s is not None]
        if wrong := [(got, has) for got, has in sides if got != has]:
            raise InputError(f"IA3 at {path} scales {wrong[0][0]} components, but the base has {wrong[0][1]}")
        return
    v = x.lora if isinstance(x, DoRA) else x
    if v.a.shape[0] != v.b.shape[1]:
        raise InputError(f"adapter at {path} has A of rank {v.a.shape[0]}, but B of rank {v.b.shape[1]}")
    got, has = [v.b.shape[0], v.a.shape[1]], [out, inp]
    if got != has:
        raise InputError(f"adapter at {path} fits a weight of {got}, but the base has {has}")
    if isinstance(x, DoRA) and x.m.shape[0] != out:
        raise InputError(f"DoRA at {path} has {x.m.shape[0]} magnitudes, but the base has {out} rows")


def _nearest(path: str, known: Mapping[str, Any]) -> str:
    if path.endswith(".qkv") and path[:-3] + "q" in known:
        return "this adapter is for a fused base: fuse(params) first"
    if path[-1:] in "qkv" and path[:-1] + "qkv" in known:
        return "this adapter is for a base that is not fused: do not fuse(params)"
    return f"the base has {', '.join(list(known)[:4])} .."


def merge(params: T, base: Any = None) -> T:
    """A plain tree again: every adapted weight becomes the one matrix it means.

    Over a quantized base there are two answers, and `onto` says which: "dequantized" adds the adapters to the numbers
    that they were trained on; the original params tree adds them to the numbers that were quantized, which they have
    never seen. Neither is the model that was trained once it is rounded to a short dtype or quantized anew:
    `fgpt.compare_outputs` measures by how much it differs.

    Raises InputError for an adapter over a quantized weight where `onto` is not given.
    """
    found = {path: x for path, x in walk(params) if isinstance(x, (Adapted, *QUANTIZED))}
    outermost = {p: w for p, w in found.items() if not any(p.startswith(f"{q}.") for q in found)}
    quantized = {p for p, w in outermost.items() if isinstance(_base_weight(w), QUANTIZED)}
    if base is None:
        if stuck := [p for p in outermost if p in quantized and isinstance(outermost[p], Adapted)]:
            raise InputError(
                f'{stuck[0]} is quantized below: merge(params, onto="dequantized"), or onto the original params'
            )
        return replace_at(params, {p: dense(w) for p, w in outermost.items() if p not in quantized})
    if isinstance(base, str):
        if base != "dequantized":
            raise InputError(f'merge onto {base!r}: expected "dequantized" or a params tree')
        return replace_at(params, {p: dense(w) for p, w in outermost.items()})
    original = {path: x for path, x in walk(base) if path in outermost}
    if lost := [p for p, w in outermost.items() if p not in original or shape(original[p]) != shape(w)]:
        raise InputError(f"{lost[0]} is not in the params to merge onto, or has another shape there")
    return replace_at(params, {p: dense(_with_base(w, original[p])) for p, w in outermost.items()})


def _base_weight(w: Weight) -> Weight:
    return _base_weight(w.base) if isinstance(w, Adapted) else w


def _with_base(w: Weight, base: Weight) -> Weight:
    return replace_at(w, {"base": _with_base(w.base, base)}) if isinstance(w, Adapted) else base


def functional_call(fn: Callable[..., R], trees: tuple[Any, ...], *args: Any) -> R:
    """fn(adapt(params, *adapters), *args) for trees = (params, *adapters): torch.func.functional_call for adapters."""
    params, *adapters = trees
    return fn(adapt(params, *adapters), *args)


def num_trainable(adapters: Adapters) -> int:
    """How many numbers are trained: counted on the tree itself, without the constants of a `stack`."""
    constants = [x.scaling for _, x in walk(adapters) if isinstance(x, LoRA)]
    return num_elements(adapters) - sum(x.numel() for x in constants if x is not None)
