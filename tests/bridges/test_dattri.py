"""dattri judges attributions made of fgpt's gradients, and makes the same."""

from itertools import combinations
from typing import Any

import pytest
import torch
from builders import tokens
from builders.transforms import ADAPTERS, BASE
from torch import Tensor
from torch.func import functional_call, grad, vmap

import fgpt
from fgpt.transforms.per_example import per_example_grads
from fgpt.tree import tree_leaves, tree_map

metric = pytest.importorskip("dattri.metric")

TRAIN, QUERIES = tokens(31, 8, 9, seed=2), tokens(31, 3, 9, seed=3)
LR = 1e-3


def as_batch(text: Tensor) -> fgpt.Batch:
    """One row, of tokens [1 positions]."""
    return fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(text[:, 1:].shape))


def loss(adapters: Any, example: fgpt.Batch) -> Tensor:
    return fgpt.nll(fgpt.adapt(BASE, adapters), example)[0]


def flat_grads(text: Tensor) -> Tensor:
    examples = [as_batch(row[None]) for row in text]
    return torch.cat([g.flatten(1) for g in tree_leaves(per_example_grads(loss, ADAPTERS, examples).grads)], 1)


SCORES = flat_grads(TRAIN) @ flat_grads(QUERIES).T
"""g_i · g_q: to first order, how much a step on example i lowers the loss of query q, over the learning rate."""


def query_losses(adapters: Any) -> Tensor:
    return vmap(lambda row: loss(adapters, as_batch(row[None])))(QUERIES)


def lowered_losses(subset: Tensor) -> Tensor:
    """By one step of descent on the examples of a subset."""
    gradient = grad(lambda a: sum(loss(a, as_batch(row[None])) for row in TRAIN[subset]))(ADAPTERS)
    return query_losses(ADAPTERS) - query_losses(tree_map(lambda x, g: x - LR * g, ADAPTERS, gradient))


def test_gradient_products_predict_a_step_and_others_do_not():
    subsets = torch.tensor(list(combinations(range(8), 4))[::6])
    truth = torch.stack([lowered_losses(subset) for subset in subsets])
    scores, _ = metric.lds(SCORES, (truth, subsets))
    assert scores.min() > 0.95
    predicted = torch.stack([SCORES[subset].sum(0) for subset in subsets])
    ranks = [x[:, 0].argsort().argsort().double() for x in (predicted, truth)]
    assert float(scores[0]) == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    rolled, _ = metric.lds(SCORES.roll(3, 0), (truth, subsets))
    assert rolled.max() < 0.5


def test_its_gradients_of_a_module_are_ours():
    """What all its attributors begin with."""
    task = pytest.importorskip("dattri.task")
    module = fgpt.as_module(loss, ADAPTERS)

    def row_loss(params: Any, text: Tensor) -> Tensor:
        return functional_call(module, params, (as_batch(text[None]),))

    attribution = task.AttributionTask(row_loss, module, module.state_dict())
    params, _ = attribution.get_param(ckpt_idx=0)
    got = attribution.get_grad_loss_func(in_dims=(None, 0))(params, TRAIN)
    torch.testing.assert_close(got, flat_grads(TRAIN), rtol=1e-4, atol=1e-5)
