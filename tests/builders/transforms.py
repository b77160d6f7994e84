"""A model, adapters and batches on which every transform of torch.func is tried."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

import fgpt
from builders import tiny, tokens, with_noise
from fgpt.data.examples import Example
from fgpt.data.packing import collate
from fgpt.tree import tree_map

BASE = tiny(n_layer=2)
ADAPTERS: Any = with_noise(fgpt.lora(BASE, fgpt.key(0), 2, target=r"wte|blocks\.\d+\.(attn\.(q|v)|mlp\.up)"), seed=1)
DIRECTION: Any = tree_map(lambda x: x - 0.1, with_noise(ADAPTERS, seed=2))


def example(n: int, seed: int) -> Example:
    return Example.completion(tuple(tokens(31, n, seed=seed).tolist()), n // 3)


PACKED = collate([[example(5, 0), example(7, 1)], [example(9, 2)]])  # segments, padding, and `at`
ROWS = fgpt.Batch(tokens(31, 3, 8), tokens(31, 3, 8, seed=1), torch.rand(3, 8, generator=fgpt.key(0)))


def loss(adapters: Any, batch: fgpt.Batch = PACKED) -> Tensor:
    return fgpt.loss(fgpt.adapt(BASE, adapters), batch)


def dot(a: Any, b: Any) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)]).sum()


def autograd(fn: Callable[[Any], Tensor], at: Any, create_graph: bool = False) -> tuple[Any, list[Tensor]]:
    """The gradient by torch.autograd, and the leaves it is of."""
    tree = tree_map(lambda x: x.detach().clone().requires_grad_(), at)
    inputs = tree_leaves(tree)
    grads = torch.autograd.grad(fn(tree), inputs, create_graph=create_graph)
    return tree_unflatten(list(grads), tree_structure(at)), inputs


def loss_with_remat(adapters: Any, batch: fgpt.Batch = PACKED) -> Tensor:
    return fgpt.loss(fgpt.adapt(BASE, adapters), batch, remat=True)
