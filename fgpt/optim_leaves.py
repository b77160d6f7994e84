"""Which leaves of a tree an optimizer treats how: by their number of dimensions, and by patterns of their paths."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor

from fgpt.errors import InputError, short_repr
from fgpt.patterns import check_patterns, first_matches, matching
from fgpt.tree import leaves, tree_map

Tree: TypeAlias = Any


def leaves_of(params: Tree, *others: Tree) -> list[list[Any]]:
    """The leaves of `params`, and what each of `others` has in their place: a tensor, or a moment's codes."""
    rows: list[tuple[Any, ...]] = []
    tree_map(lambda *xs: rows.append(xs), params, *others)
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in (params, *others)]


def decay_mask(params: Tree, pattern: str) -> list[bool]:
    """For each leaf whether it has two dimensions or more and its whole path matches `pattern`."""
    by_path = _leaves_by_path(params)
    decayed = set(matching(pattern, [path for path, x in by_path.items() if x.ndim > 1]))
    return [path in decayed for path in by_path]


def lr_patterns(params: Tree, multipliers: Mapping[str, Any]) -> list[str | None]:
    """For each leaf the pattern of `multipliers` that gives its factor; None is a factor of 1."""
    paths = list(_leaves_by_path(params))
    first = first_matches(paths, multipliers)
    return [first.get(path) for path in paths]


def check_multipliers(multipliers: Mapping[str, Any], params: Tree | None = None) -> None:
    """Raises InputError for a pattern that is no regular expression or matches no leaf of `params`, and for a factor
    that is no finite number from 0 on.
    """
    for pattern, factor in multipliers.items():
        matching(pattern, [], "lr_multipliers")
        if not isinstance(factor, Tensor) and not 0 <= factor < float("inf"):
            raise InputError(f"lr_multipliers {short_repr(pattern)} is {factor}: expected a number of 0 or more")
    if params is not None:
        check_patterns(list(_leaves_by_path(params)), multipliers, "lr_multipliers")


def _leaves_by_path(params: Tree) -> dict[str, Tensor]:
    """The leaves, of a matrix that is trained in parts by the path of the matrix: so options name it alike in any
    number of processes.
    """
    return {path.removesuffix("/part"): x for path, x in leaves(params).items()}
