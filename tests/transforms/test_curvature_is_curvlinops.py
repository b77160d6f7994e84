"""Products of operators are those of curvlinops, of the same function as a module."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import close, tiny, tokens, with_noise
from torch import Tensor, nn

import fgpt
from fgpt.transforms.curvature import ggn_operator, hessian_operator
from fgpt.tree import astype, ravel, tree_map

curvlinops = pytest.importorskip("curvlinops")

BASE = astype(tree_map(lambda x: 0.5 * x, tiny()), torch.float64)
ADAPTERS = with_noise(astype(fgpt.lora(BASE, fgpt.key(0), 2, target=r".*\.(q|v|up)"), torch.float64), 0.2)
TEXT = tokens(31, 3, 8)
TARGETS = TEXT[:, 1:].flatten()


def logits(adapters: Any, x: Tensor) -> Tensor:
    """tokens [batch seq] -> logits [batch*seq vocab]"""
    return fgpt.apply(fgpt.adapt(BASE, adapters), x).flatten(0, -2)


@pytest.mark.parametrize("kind", ["HessianLinearOperator", "GGNLinearOperator"])
def test_products(kind: str):
    module = fgpt.as_module(logits, ADAPTERS)
    theirs = getattr(curvlinops, kind)(
        module, nn.CrossEntropyLoss(), list(module.parameters()), [(TEXT[:, :-1], TARGETS)], check_deterministic=False
    )
    if kind == "HessianLinearOperator":
        operator = hessian_operator(lambda a: F.cross_entropy(logits(a, TEXT[:, :-1]), TARGETS), ADAPTERS)
    else:
        operator = ggn_operator(lambda a: logits(a, TEXT[:, :-1]), lambda z: F.cross_entropy(z, TARGETS), ADAPTERS)
    vector, unravel = ravel(ADAPTERS)
    v = torch.randn(vector.shape, generator=fgpt.key(1), dtype=vector.dtype)
    expected = theirs @ v
    assert float(expected.norm()) > 1e-2
    close(ravel(operator(unravel(v)))[0], expected, 1e-12)
