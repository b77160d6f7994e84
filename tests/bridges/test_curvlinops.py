"""curvlinops' operators over a module of adapters."""

from typing import Any

import pytest
import torch
from builders import tokens
from builders.transforms import ADAPTERS, BASE, DIRECTION
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.tree import tree_leaves

curvlinops = pytest.importorskip("curvlinops")

TEXT, TARGETS = tokens(31, 3, 8), tokens(31, 3, 8, seed=1)
DATA = [(TEXT[:2], TARGETS[:2]), (TEXT[2:], TARGETS[2:])]


def class_logits(adapters: Any, text: Tensor) -> Tensor:
    """[batch classes positions], as torch's cross-entropy takes them."""
    return fgpt.apply(fgpt.adapt(BASE, adapters), text).transpose(-1, -2)


def mean_loss(adapters: Any) -> Tensor:
    return nn.functional.cross_entropy(class_logits(adapters, TEXT), TARGETS)


def flat(tree: Any) -> Tensor:
    return torch.cat([x.flatten() for x in tree_leaves(tree)])


def operator(kind: Any, **options: Any) -> Any:
    module = fgpt.as_module(class_logits, ADAPTERS)
    return kind(module, nn.CrossEntropyLoss(), list(module.parameters()), DATA, **options)


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))


def test_hessian_vector_products_are_those_of_torch_func():
    _, expected = jvp(grad(mean_loss), (ADAPTERS,), (DIRECTION,))
    assert_near(operator(curvlinops.HessianLinearOperator) @ flat(DIRECTION), flat(expected))


def test_the_empirical_fisher_is_the_mean_of_squares_of_gradients():
    """1/n Σ g gᵀ v over all n positions, each an example."""

    def at_position(adapters: Any, text: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        logits = class_logits(adapters, text[None])[0].T
        return mask @ nn.functional.cross_entropy(logits, target, reduction="none")

    gradients = vmap(vmap(grad(at_position), in_dims=(None, None, None, 0)), in_dims=(None, 0, 0, None))
    each = gradients(ADAPTERS, TEXT, TARGETS, torch.eye(8))
    g = torch.cat([x.flatten(0, 1).flatten(1) for x in tree_leaves(each)], 1)
    fisher = operator(curvlinops.EFLinearOperator)
    assert_near(fisher @ flat(DIRECTION), g.T @ (g @ flat(DIRECTION)) / len(g))
