"""Nodes are trees to optree as they are to torch, once fgpt is told to register them."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from builders import ROOT
from builders.transforms import ADAPTERS, BASE
from builders.trees import INTEGERS, Pair, plain, trees
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import fgpt
from fgpt.tree import leaves, node

optree = pytest.importorskip("optree")
fgpt.register_with_optree()

PROBE = """
import sys, torch, fgpt
assert "optree" not in sys.modules
import optree
update = fgpt.LoRA(torch.ones(1, 2), torch.zeros(2, 1), alpha=1.0)
before = len(optree.tree_leaves(update))
fgpt.register_with_optree()
print(before, len(optree.tree_leaves(update)))
"""


@given(trees(INTEGERS | st.integers(0, 9)))
def test_maps_are_those_of_torch(tree: Any):
    other = pytree.tree_map(lambda x: x + 1, tree)
    assert plain(optree.tree_map(lambda x, y: x - 3 * y, tree, other)) == plain(
        pytree.tree_map(lambda x, y: x - 3 * y, tree, other)
    )
    values, structure = optree.tree_flatten(tree)
    assert plain(optree.tree_unflatten(structure, values)) == plain(tree)
    assert [accessor(tree) for accessor in optree.tree_accessors(tree)] == values


@pytest.mark.parametrize("tree", [ADAPTERS, BASE, fgpt.quantize(BASE, "int8")], ids=["adapters", "params", "int8"])
def test_leaves_are_those_of_fgpt(tree: Any):
    """In optree's order, which is sorted by key."""
    expected = leaves(tree)
    got = optree.tree_leaves(tree)
    assert {id(x) for x in got} == {id(x) for x in expected.values()}
    assert len(got) == len(expected)


@pytest.mark.parametrize("other", [Pair(1, 2, "b"), Pair(1, None, "a")], ids=["static", "absent"])
def test_nodes_of_another_structure_are_refused(other: Pair):
    with pytest.raises(ValueError, match="Mismatch"):
        optree.tree_map(lambda x, y: x, Pair(1, 2, "a"), other)


def test_later_nodes_are_registered_too_and_a_second_call_changes_nothing():
    fgpt.register_with_optree()

    @node
    class Later:
        w: Any

    assert optree.tree_paths({"x": Later(torch.ones(2))}) == [("x", "w")]


def test_importing_fgpt_registers_nothing():
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2"]
