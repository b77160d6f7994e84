"""One base, many adapters: several sets of adapters as one tree with a leading axis, for `vmap`.

    vmap(lambda a, x: apply(adapt(params, a), x))(stack([tom, anna, tom]), rows)

multiplies the base with all rows at once, and each row with its own A and B. Adapters are values: to swap one in is to
name it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fgpt.adapters import Adapters, LoRA
from fgpt.errors import InputError
from fgpt.tree import tree_map


def stack(adapters: Sequence[Mapping[str, Any]]) -> Adapters:
    """The trees as one, leaf beside leaf, in their order. LoRAs may differ in rank, strength and targets: those of a
    lower rank are filled with zeros, and one that is absent is zero. Differentiable.

    Raises InputError where what is no LoRA differs in kind or shape, or is absent from some of the trees.
    """
    if not adapters:
        raise InputError("no adapters to stack: expected one or more")
    paths = list(dict.fromkeys(path for tree in adapters for path in tree))
    return {path: _together(path, [tree.get(path) for tree in adapters]) for path in paths}


def _together(path: str, some: Sequence[Any]) -> Any:
    known = next(x for x in some if x is not None)
    if isinstance(known, LoRA) and all(x is None or isinstance(x, LoRA) for x in some):
        some = _alike([x or LoRA(known.a[:0], known.b[:, :0], 1.0) for x in some])
    spec = pytree.tree_structure(known if not isinstance(known, LoRA) else some[0])
    for i, x in enumerate(some):
        if x is None:
            raise InputError(f"adapters {i} have nothing at {path}, where others have a {type(known).__name__}")
        if pytree.tree_structure(x) != spec:
            raise InputError(f"the adapters at {path} are of different kinds or settings: only LoRAs may differ")
    shapes = {tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(x)) for x in some}
    if len(shapes) > 1:
        raise InputError(f"the adapters at {path} have different shapes: {' and '.join(map(str, sorted(shapes)))}")
    return tree_map(lambda *xs: torch.stack(xs), *some)


def _alike(some: Sequence[LoRA]) -> list[LoRA]:
    """The same updates by LoRAs of one rank, of strength 1, without dropout."""
    rank = max(1, *(len(x.a) for x in some))

    def wider(x: Tensor, rows: int, columns: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0]))

    return [
        LoRA(wider(x.a, rank, x.a.shape[1]), wider(x.b * x.scale if len(x.a) else x.b, x.b.shape[0], rank), float(rank))
        for x in some
    ]
