"""One base, many adapters: several sets of adapters as one tree with a leading axis, for `vmap`.

    vmap(lambda a, x: apply(adapt(params, a), x))(stack([tom, anna, tom]), rows)

multiplies the base with all rows at once, and each row with its own A and B. Adapters are values: to swap one in is to
name it. To train them together is to map over the step of one:

    state = vmap(lambda a: start(a, optimizer))(stack(members))
    state, metrics = vmap(lambda s, i: step(s, params, batches, fold_in(rng, i)))(state, torch.arange(len(members)))
    members = unstack(state.trainable)

Each member then takes the steps that it would take alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fgpt.adapters import Adapters, DoRA, LoRA
from fgpt.errors import InputError
from fgpt.tree import leaves, tree_map


def stack_adapters(adapters: Sequence[Mapping[str, Any]]) -> Adapters:
    """The trees as one, leaf beside leaf, in their order. LoRAs may differ in rank, strength and targets: those of a
    lower rank are filled with zeros, one that is absent is zero, and where strengths or ranks differ each member's
    s = alpha / rank stands beside its A and B as a constant. Zeros stay zero and constants stay constant in training.
    Differentiable.

    Raises InputError where LoRAs differ in dropout, and where what is no LoRA differs in kind or shape, or is absent
    from some of the trees.
    """
    if not adapters:
        raise InputError("no adapters to stack: expected one or more")
    paths = list(dict.fromkeys(path for tree in adapters for path in tree))
    return {path: _together(path, [tree.get(path) for tree in adapters]) for path in paths}


def unstack_adapters(stacked: Mapping[str, Any]) -> list[Adapters]:
    """The members of a stack, each as it is on its own: without rows of zeros, its strength in alpha.

    Raises InputError for trees that are no stack.
    """
    sizes = {x.shape[:1] for x in leaves(stacked).values()}
    if len(sizes) != 1 or not next(iter(sizes)):
        raise InputError(f"expected a stack, all leaves of one leading size, got sizes {sorted(map(tuple, sizes))}")
    members = [tree_map(lambda x, i=i: x[i], dict(stacked)) for i in range(next(iter(sizes))[0])]
    return [
        {path: _alone(x) for path, x in member.items() if not (isinstance(x, LoRA) and _absent(x))}
        for member in members
    ]


def without_dropout(adapters: Mapping[str, Any]) -> Adapters:
    """The same adapters where nothing is dropped: what those that differ in dropout have in common."""

    def plain(x: Any) -> Any:
        if isinstance(x, DoRA):
            return replace(x, lora=plain(x.lora))
        return replace(x, dropout=0.0) if isinstance(x, LoRA) else x

    return {path: plain(x) for path, x in adapters.items()}


def _together(path: str, members: Sequence[Any]) -> Any:
    present = [x for x in members if x is not None]
    if all(isinstance(x, LoRA) for x in present):
        members = _with_equal_rank(path, members)
    spec = pytree.tree_structure(next(x for x in members if x is not None))
    for i, x in enumerate(members):
        if x is None:
            raise InputError(f"adapters {i} have nothing at {path}, where others have a {type(present[0]).__name__}")
        if pytree.tree_structure(x) != spec:
            raise InputError(f"the adapters at {path} are of different kinds or settings: only LoRAs may differ")
    shapes = {tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(x)) for x in members}
    if len(shapes) > 1:
        raise InputError(f"the adapters at {path} have different shapes: {' and '.join(map(str, sorted(shapes)))}")
    return tree_map(lambda *xs: torch.stack(xs), *members)


def _with_equal_rank(path: str, members: Sequence[LoRA | None]) -> list[LoRA]:
    """The same LoRAs at one rank, each with its scale as a tensor; as they are where that says nothing new."""
    present = [x for x in members if x is not None]
    settings = {(x.a.shape[0], x.alpha, x.rs, x.scaling is None) for x in present}
    if len({x.dropout for x in present}) > 1:
        rates = " and ".join(map(str, sorted({x.dropout for x in present})))
        raise InputError(
            f"the LoRAs at {path} have dropouts of {rates}: members of a stack drop at one rate, "
            "so set one for all of them (0.0 where they are not to be trained)"
        )
    if len(settings) == 1 and len(present) == len(members):
        return present
    rank, one = max(1, *(x.a.shape[0] for x in present)), present[0]

    def wider(x: Tensor, rows: int, columns: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0]))

    def with_rank(x: LoRA | None) -> LoRA:
        a, b = (one.a[:0], one.b[:, :0]) if x is None else (x.a, x.b)
        s = one.a.new_tensor(0.0 if x is None else x.scale) if x is None or x.scaling is None else x.scaling
        return LoRA(wider(a, rank, a.shape[1]), wider(b, b.shape[0], rank), 0.0, False, one.dropout, s)

    return [with_rank(x) for x in members]


def _absent(x: LoRA) -> bool:
    return x.scaling is not None and not x.scaling.any()


def _alone(x: Any) -> Any:
    if not isinstance(x, LoRA) or x.scaling is None:
        return x
    used = (x.a.any(1) | x.b.any(0)).nonzero()
    rank = max(1, int(used.max()) + 1) if len(used) else 1
    return LoRA(x.a[:rank], x.b[:, :rank], float(x.scaling) * rank, False, x.dropout)
