"""One base, many adapters: several sets of adapters as one tree with a leading axis, for `vmap`.

    vmap(lambda a, x: apply(adapt(params, a), x))(stack_adapters([tom, anna, tom]), tokens)

multiplies the base with all rows at once, and each row with its own A and B. A training step can be mapped over them:

    state = vmap(lambda a: init_state(a, optimizer))(stack_adapters(members))
    state, metrics = vmap(lambda s, i: step(s, params, batches, fold_in(rng, i)))(state, torch.arange(len(members)))
    members = unstack_adapters(state.trainable)

Each member then takes the steps that it would take alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fgpt.adapter_dora import DoRA
from fgpt.adapter_lora import LoRA
from fgpt.adapter_types import Adapters
from fgpt.errors import InputError
from fgpt.tree import leaves, tree_map


def stack_adapters(adapters: Sequence[Mapping[str, Any]]) -> Adapters:
    """Several sets of adapters as one, each leaf stacked along a new first axis. Differentiable.

    LoRAs may differ in rank, scale and targets, DoRAs in rank and scale. Those of a lower rank are padded with zeros, a
    missing LoRA is zero, and if scales or ranks differ, each member's s = alpha / rank is a tensor next to its A and B.
    In training zeros stay zero and scales stay constant.

    Args:
        adapters: One or more sets.

    Raises:
        InputError: if LoRAs differ in dropout, or if adapters of another kind differ in kind or shape or are missing
            from some of the sets.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> stacked = fgpt.stack_adapters([fgpt.lora(params, fgpt.key(i), rank) for i, rank in enumerate((2, 4))])
    >>> stacked["blocks.0.attn.q"].a.shape
    torch.Size([2, 4, 8])
    """
    if not adapters:
        raise InputError("no adapters to stack: expected one or more")
    paths = list(dict.fromkeys(path for tree in adapters for path in tree))
    return {path: _stack_members(path, [tree.get(path) for tree in adapters]) for path in paths}


def unstack_adapters(stacked: Mapping[str, Any]) -> list[Adapters]:
    """The members of a stack, without padding and with the scale in alpha.

    Args:
        stacked: What `stack_adapters` returned, trained or not.

    Raises:
        InputError: for adapters that are not a stack.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> members = [fgpt.lora(fgpt.init(config, fgpt.key(0)), fgpt.key(i), 2) for i in range(3)]
    >>> len(fgpt.unstack_adapters(fgpt.stack_adapters(members)))
    3
    """
    sizes = {x.shape[:1] for x in leaves(stacked).values()}
    if len(sizes) != 1 or not next(iter(sizes)):
        raise InputError(f"expected a stack, all leaves of one leading size, got sizes {sorted(map(tuple, sizes))}")
    result: list[Adapters] = []
    for i in range(next(iter(sizes))[0]):
        member = tree_map(lambda x, i=i: x[i], dict(stacked))
        result.append({path: _without_padding(x) for path, x in member.items() if not _is_missing(x)})
    return result


def without_dropout(adapters: Mapping[str, Any]) -> Adapters:
    """The same adapters with dropout 0, so that sets that differ in dropout can be stacked."""

    def convert(x: Any) -> Any:
        if isinstance(x, DoRA):
            return replace(x, lora=convert(x.lora))
        return replace(x, dropout=0.0) if isinstance(x, LoRA) else x

    return {path: convert(x) for path, x in adapters.items()}


def _stack_members(path: str, members: Sequence[Any]) -> Any:
    """The adapters at one path as one; None is missing."""
    present = [x for x in members if x is not None]
    if all(isinstance(x, LoRA) for x in present):
        members = _with_one_shape(path, members)
    elif all(isinstance(x, DoRA) for x in members):
        loras = _with_one_shape(path, [x.lora for x in members])
        members = [replace(x, lora=lora) for x, lora in zip(members, loras, strict=True)]
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


def _with_one_shape(path: str, members: Sequence[LoRA | None]) -> list[LoRA]:
    """The LoRAs padded to the largest rank, each with its scale as a tensor; unchanged if they agree in all of it."""
    present = [x for x in members if x is not None]
    dropouts = sorted({x.dropout for x in present})
    if len(dropouts) > 1:
        raise InputError(
            f"the LoRAs at {path} have dropouts of {' and '.join(map(str, dropouts))}: the members of a stack have one "
            "dropout, so set it for all of them (0.0 if they are not trained)"
        )
    settings = {(x.a.shape[0], x.alpha, x.rs, x.scaling is None) for x in present}
    if len(settings) == 1 and len(present) == len(members):
        return present
    rank = max(1, *(x.a.shape[0] for x in present))
    missing = replace(present[0], a=present[0].a[:0], b=present[0].b[:, :0], scaling=present[0].a.new_tensor(0.0))
    return [_pad_rank(missing if x is None else x, rank) for x in members]


def _pad_rank(x: LoRA, rank: int) -> LoRA:
    """The same LoRA with more rows of A and columns of B, all zero."""
    extra = rank - x.a.shape[0]
    a = torch.nn.functional.pad(x.a, (0, 0, 0, extra))
    b = torch.nn.functional.pad(x.b, (0, extra))
    scaling = x.a.new_tensor(x.scale) if x.scaling is None else x.scaling
    return LoRA(a, b, 0.0, False, x.dropout, scaling)


def _is_missing(x: Any) -> bool:
    """Whether this member of a stack stands for a LoRA that the set did not have."""
    return isinstance(x, LoRA) and x.scaling is not None and not x.scaling.any()


def _without_padding(x: Any) -> Any:
    if isinstance(x, DoRA):
        return replace(x, lora=_without_padding(x.lora))
    if not isinstance(x, LoRA) or x.scaling is None:
        return x
    used = (x.a.any(1) | x.b.any(0)).nonzero()
    rank = max(1, int(used.max()) + 1) if len(used) else 1
    return LoRA(x.a[:rank], x.b[:, :rank], float(x.scaling) * rank, False, x.dropout)
