"""Trees that are written to files, and their comparison."""

from typing import Any

import torch
from torch.utils import _pytree as pytree

import fgpt
from builders import tiny


def assert_trees_identical(a: Any, b: Any) -> None:
    """Asserts the same nodes with the same static fields, and bitwise the same tensors."""
    assert pytree.tree_structure(a) == pytree.tree_structure(b)
    x, y = pytree.tree_leaves(a), pytree.tree_leaves(b)
    assert all(p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(x, y, strict=True))


def wide_gpt(**overrides: Any) -> fgpt.GPT:
    return tiny(**{"d_model": 64, "d_mlp": 128} | overrides)
