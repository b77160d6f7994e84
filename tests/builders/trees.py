"""Trees of every container that fgpt.tree knows, for laws about trees."""

from collections import OrderedDict
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from fgpt.tree import node, static


@node
class Pair:
    first: Any
    second: Any = None
    name: str = static(default="")


def trees(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nodes, lists, tuples and dicts of `leaf`, with fields that are None, static fields and keys with a dot."""

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        few = st.lists(inner, max_size=3)
        return st.one_of(
            st.builds(Pair, inner, st.none() | inner, st.sampled_from("ab")),
            few,
            few.map(tuple),
            st.dictionaries(st.sampled_from(["a", "b", "c.d"]), inner, max_size=3),
            st.dictionaries(st.sampled_from("xy"), inner, max_size=2).map(OrderedDict),
        )

    return st.recursive(leaf, containers, max_leaves=8)


INTEGERS = st.integers(-9, 9).map(torch.tensor)


def plain(tree: Any) -> tuple[Any, list[Any]]:
    """Structure and numbers."""
    xs, structure = pytree.tree_flatten(tree)
    return structure, [x.item() if isinstance(x, Tensor) else x for x in xs]
