"""Walks over trees, against torch's pytree, where every node is registered too."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from builders.trees import INTEGERS, Pair, plain, trees
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import fgpt
from fgpt.errors import InputError
from fgpt.tree import describe, leaves, ravel, replace_at, tree_leaves, tree_map, unflatten_like

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


NUMBERS = st.lists(st.integers(-9, 9).map(float), max_size=3)


@given(trees(NUMBERS.map(lambda numbers: torch.tensor([numbers]))))
def test_a_tree_is_a_vector_in_pytree_order(tree: Any):
    vector, unravel = ravel(tree)
    assert vector.tolist() == [x for leaf in pytree.tree_leaves(tree) for x in leaf.flatten().tolist()]
    back = unravel(vector)
    assert pytree.tree_structure(back) == pytree.tree_structure(tree)
    for x, y in zip(pytree.tree_leaves(back), pytree.tree_leaves(tree), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_a_vector_of_several_dtypes_has_the_digits_of_all():
    tree = {"a": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "b": torch.tensor(0.1), "c": torch.ones(1).double()}
    for path, dtype in (("b", torch.float32), ("c", torch.float64)):
        vector, unravel = ravel({"a": tree["a"], path: tree[path]})
        assert vector.dtype == dtype
        assert {name: x.dtype for name, x in unravel(vector + 1).items()} == {"a": torch.bfloat16, path: dtype}
    assert ravel({"a": tree["a"]})[0].dtype == torch.bfloat16
    half = ravel({"a": tree["a"], "h": torch.ones(1, dtype=torch.float16)})[0]
    assert half.dtype == torch.float32  # neither holds the other


def test_vectors_under_transforms():
    tree = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(5.0)}
    vector, unravel = ravel(tree)
    gradient = torch.func.grad(lambda v: unravel(v)["w"].pow(2).sum() + 7 * unravel(v)["b"])(vector)
    assert gradient.tolist() == [2, 4, 6, 8, 7]
    many = torch.func.vmap(unravel)(torch.stack([vector, 2 * vector]))
    assert many["w"].shape == (2, 2, 2)
    assert many["b"].tolist() == [5, 10]
    assert torch.func.vmap(lambda t: ravel(t)[0])(many).tolist() == [vector.tolist(), (2 * vector).tolist()]


def test_what_is_no_vector():
    for leaf, says in ((torch.tensor(1), "a leaf of int64"), (3, "a leaf of int")):
        with pytest.raises(InputError, match=says):
            ravel({"a": torch.ones(1), "b": leaf})
    with pytest.raises(InputError, match=r"a vector of 2 elements, got shape \[3\]"):
        ravel([torch.ones(2)])[1](torch.ones(3))
    assert ravel({})[0].shape == (0,)
    assert ravel({})[1](torch.zeros(0)) == {}


@given(trees(st.integers(0, 3).map(lambda n: torch.full((n, 2), 123.0))))
def test_a_description_has_every_shape_and_no_element(tree: Any):
    text = describe({"tree": tree})
    assert "123" not in text
    for x in pytree.tree_leaves(tree):
        assert f"float32{list(x.shape)}" in text


def test_params_show_their_shapes(gpt: fgpt.GPT):
    text = repr(gpt)
    assert len(text) < 4000
    assert f"wte=Embedding(w=float32{list(gpt.wte.w.shape)})" in text
    assert f"{gpt.cfg.n_layer} x Block(" in text
    changed = replace_at(gpt, {"blocks.0.attn.q.b": gpt.blocks[0].attn.q.b.double()})
    assert " x Block(" not in repr(changed)  # a block that differs from the other stands by itself
    adapter = fgpt.LoRA(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    assert repr(adapter).startswith("LoRA(a=float32[2, 3], b=float32[4, 2], alpha=1.0")
    mapped = []
    torch.func.vmap(lambda x: (mapped.append(repr(fgpt.LoRA(x, x, 1.0))), x)[1])(torch.ones(5, 2, 2))
    assert mapped[0].startswith("LoRA(a=float32[2, 2], ")
