"""Adapters: small trees of float tensors that a transform lays over a frozen params tree.

    Adapters = {path: LoRA | Tensor}

A `LoRA` at the path of a layer adapts its weight; a plain tensor at the path of a leaf replaces that leaf. LoRA, norm,
bias, partial and full tuning are one mechanism, and they compose by dict union: `lora(..) | tune(..)`. The adapters are
the one tree that is differentiated.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.errors import InputError
from fgpt.rng import fold_in
from fgpt.tree import count, leaves, node, select, static, update, walk
from fgpt.weights import Adapted, Weight, dense, shape

T = TypeVar("T")
R = TypeVar("R")


@node
class LoRA:
    """W' = W + (alpha / rank) B·A.

    Source: Hu et al. 2021, section 4.1.
    """

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    alpha: float = static()

    @property
    def scale(self) -> float:
        return self.alpha / self.a.shape[0]


Adapter: TypeAlias = LoRA | Tensor
Adapters: TypeAlias = dict[str, Adapter]


def layers(params: Any) -> dict[str, Weight]:
    """The weight matrices of `params` by the path of the layer that holds them: what a LoRA can adapt."""
    found = ((path, getattr(x, "w", None)) for path, x in walk(params) if not isinstance(x, Tensor | Adapted))
    return {path: w for path, w in found if isinstance(w, Adapted) or (isinstance(w, Tensor) and w.ndim == 2)}


def lora(
    params: Any,
    rng: torch.Generator,
    rank: int = 8,
    alpha: int | float | None = None,
    target: str = r"blocks\..*\.(q|k|v|qkv)",
) -> Adapters:
    """A fresh LoRA on every layer whose path matches `target` in full: B = 0, so that it begins as the identity, and A
    uniform in ±1/sqrt(in) (Kaiming, as in the paper's code). `alpha` is 2·rank unless given. Adapters are fp32.

    Raises InputError where `target` matches nothing, or `rank` exceeds a layer's smaller side.
    """
    weights = layers(params)
    adapters: Adapters = {}
    for path in select(weights, target):
        out, inp = shape(weights[path])
        if not 1 <= rank <= min(out, inp):
            raise InputError(
                f"rank {rank} on {path}: expected 1 to {min(out, inp)}, the smaller side of [{out}, {inp}]"
            )
        device = next(iter(leaves({"": weights[path]}).values())).device
        a, most = torch.empty(rank, inp, dtype=torch.float32), inp**-0.5
        a.uniform_(-most, most, generator=fold_in(rng, path))
        b = torch.zeros(out, rank, dtype=torch.float32)
        adapters[path] = LoRA(a.to(device), b.to(device), float(2 * rank if alpha is None else alpha))
    return adapters


def tune(params: Any, target: str = ".*") -> Adapters:
    r"""The leaves themselves, fp32, as the trainable tree: `".*ln_.*"` tunes norms, `r".*\.b"` biases, `".*"` all.

    Raises InputError where `target` matches nothing.
    """
    found = leaves(params)
    return {path: found[path].float() for path in select(found, target)}


def adapt(params: T, *adapters: Mapping[str, Any]) -> T:
    """`params` with each of `adapters` laid over it in turn. Only touched paths are rebuilt; nothing is multiplied.

    Within one tree tensors come first: a LoRA lies on the weight that the tree itself puts there.

    Raises InputError where a path or a shape does not fit the params.
    """
    for tree in adapters:
        tensors, new = leaves(params), {p: x for p, x in tree.items() if isinstance(x, Tensor)}
        for path, x in new.items():
            if path not in tensors:
                raise InputError(f"no leaf '{path}' to replace; {_nearest(path, tensors)}")
            if x.shape != tensors[path].shape:
                got, has = list(x.shape), list(tensors[path].shape)
                raise InputError(f"tensor at {path} has shape {got}, but the base has {has}")
        params = update(params, new)
        weights, adapted = layers(params), {}
        for path, x in tree.items():
            if isinstance(x, Tensor):
                continue
            if path not in weights:
                raise InputError(f"no layer '{path}' to adapt; {_nearest(path, weights)}")
            got, has = [x.b.shape[0], x.a.shape[1]], list(shape(weights[path]))
            if got != has:
                raise InputError(f"adapter at {path} fits a weight of {got}, but the base has {has}")
            adapted[f"{path}.w"] = Adapted(weights[path], x.a, x.b, x.scale)
        params = update(params, adapted)
    return params


def _nearest(path: str, known: Mapping[str, Any]) -> str:
    if path.endswith(".qkv") and path[:-3] + "q" in known:
        return "this adapter is for a fused base: fuse(params) first"
    if path[-1:] in "qkv" and path[:-1] + "qkv" in known:
        return "this adapter is for a base that is not fused: do not fuse(params)"
    return f"the base has {', '.join(list(known)[:4])} .."


def merge(params: T) -> T:
    """A plain tree again: every adapted weight becomes the one matrix it means."""
    found = {path: dense(x) for path, x in walk(params) if isinstance(x, Adapted)}
    outermost = {p: w for p, w in found.items() if not any(p.startswith(f"{q}.") for q in found)}
    return update(params, outermost)


def functional_call(fn: Callable[..., R], trees: tuple[Any, ...], *args: Any) -> R:
    """fn(adapt(params, *adapters), *args) for trees = (params, *adapters): torch.func.functional_call for adapters."""
    params, *adapters = trees
    return fn(adapt(params, *adapters), *args)


def trainable(adapters: Adapters) -> int:
    """How many numbers are trained: counted on the tree itself."""
    return count(adapters)
