"""Walks over trees, against torch's pytree, where every node is registered too."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from builders.trees import INTEGERS, Pair, plain, trees
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from fgpt.tree import leaves, replace_at, tree_leaves, tree_map, unflatten_like

TREES = trees(INTEGERS | st.integers(0, 9))


@given(TREES)
def test_maps_are_those_of_pytree(tree: Any):
    other = pytree.tree_map(lambda x: x + 1, tree)
    assert plain(tree_map(lambda x: 2 * x, tree)) == plain(pytree.tree_map(lambda x: 2 * x, tree))
    both = pytree.tree_map(lambda x, y: x - 3 * y, tree, other)
    assert plain(tree_map(lambda x, y: x - 3 * y, tree, other)) == plain(both)
    assert all(x is y for x, y in zip(tree_leaves(tree), pytree.tree_leaves(tree), strict=True))
    assert plain(unflatten_like(tree, tree_leaves(other))) == plain(other)


@given(TREES, TREES)
def test_trees_of_another_structure_are_refused(tree: Any, other: Any):
    """Where pytree refuses them: a leaf of the first may stand for anything in the second."""
    try:
        expected = pytree.tree_map(lambda x, y: [x, y], tree, other)
    except ValueError:
        with pytest.raises(ValueError, match=r"(?i)structure|mismatch"):
            tree_map(lambda x, y: [x, y], tree, other)
    else:
        assert plain(tree_map(lambda x, y: [x, y], tree, other)) == plain(expected)


def test_the_order_of_keys_is_that_of_the_first():
    got = tree_map(lambda x, y: x - y, {"a": torch.tensor(5), "b": torch.tensor(7)}, {"b": 1, "a": 2})
    assert list(got) == ["a", "b"]
    assert plain(got)[1] == [3, 6]
    of_another_kind = tree_map(lambda x, y: x - y, {"a": torch.tensor(5)}, OrderedDict(a=2))
    assert type(of_another_kind) is dict
    assert plain(of_another_kind)[1] == [3]


@pytest.mark.parametrize("other", [Pair(1, 2, "b"), Pair(1, None, "a"), [1, 2]], ids=["static", "absent", "type"])
def test_nodes_that_differ_are_named(other: Any):
    with pytest.raises(ValueError, match=r"(?s)one structure, got .*Pair.* and "):
        tree_map(lambda x, y: x, Pair(1, 2, "a"), other)


def test_leaves_and_updates_go_by_path():
    tree = {"blocks": [Pair(torch.tensor(1)), Pair(torch.tensor(2), {"w": torch.tensor(3)})]}
    assert {path: x.item() for path, x in leaves(tree).items()} == {
        "blocks.0.first": 1,
        "blocks.1.first": 2,
        "blocks.1.second.w": 3,
    }
    updated = replace_at(tree, {"blocks.1.second.w": torch.tensor(9)})
    assert plain(updated)[1] == [1, 2, 9]
    assert plain(tree)[1] == [1, 2, 3]
    assert updated["blocks"][0] is tree["blocks"][0]
