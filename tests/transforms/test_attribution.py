"""Effects of training rows beside loops, and their score beside scipy's rank correlation."""

from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor
from torch.func import grad

import fgpt
from fgpt.transforms.attribution import influence, lds, tracin
from fgpt.transforms.laplace import Curvature, curvature_of_matrix, kronecker_curvature
from fgpt.transforms.per_example import gradient_products
from fgpt.tree import ravel, tree_leaves, tree_map

BASE = tiny()
POINTS = [with_noise(fgpt.lora(BASE, fgpt.key(i), 2), seed=i) for i in range(2)]


def rows(count: int, seed: int) -> list[fgpt.Batch]:
    """Of several lengths."""
    result = []
    for i in range(count):
        text = tokens(31, 1, 6 + i, seed=seed + i)
        result.append(fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 5 + i)))
    return result


EXAMPLES, QUERIES = rows(4, 0), rows(3, 50)


def total(adapters: Any, row: fgpt.Batch) -> Tensor:
    return fgpt.nll(fgpt.adapt(BASE, adapters), row)[0]


def mean(adapters: Any, row: fgpt.Batch) -> Tensor:
    return fgpt.loss(fgpt.adapt(BASE, adapters), row)


def dot(a: Any, b: Any) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def products(params: Any) -> Tensor:
    def product(example: fgpt.Batch, query: fgpt.Batch) -> float:
        return dot(grad(total)(params, example), grad(mean)(params, query))

    return torch.tensor([[product(example, query) for query in QUERIES] for example in EXAMPLES])


def test_gradient_products_are_those_of_a_loop():
    got = gradient_products(total, POINTS[0], EXAMPLES, QUERIES, mean, chunk_size=3)
    close(got, products(POINTS[0]), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diagonal", "full", "kronecker"])
def test_influence_is_that_of_an_explicit_inverse(kind: str):
    params, damping = POINTS[0], 0.3
    vector, unravel = ravel(params)
    if kind == "diagonal":
        h = torch.rand(vector.shape, generator=fgpt.key(0))
        curvature, matrix = Curvature(unravel(h), lambda x: x, lambda x: x), h.diag()
    elif kind == "full":
        root = torch.randn(len(vector), 20, generator=fgpt.key(0))
        matrix = root @ root.T
        curvature = curvature_of_matrix(matrix, params)
    else:

        def logits(adapters: Any, batch: fgpt.Batch) -> Tensor:
            return fgpt.apply(fgpt.adapt(BASE, adapters), batch.tokens).flatten(0, -2)

        curvature = kronecker_curvature(logits, params, EXAMPLES, fgpt.key(0))
        columns: list[Tensor] = []
        for unit in torch.eye(len(vector)):
            scaled = tree_map(torch.mul, curvature.eigenvalues, curvature.rotate(unravel(unit)))
            columns.append(ravel(curvature.rotate_back(scaled))[0])
        matrix = torch.stack(columns, 1)
    inverse = torch.linalg.inv(matrix.double() + damping * torch.eye(len(vector)).double())
    of_rows = torch.stack([ravel(grad(total)(params, row))[0] for row in EXAMPLES]).double()
    of_queries = torch.stack([ravel(grad(mean)(params, row))[0] for row in QUERIES]).double()
    expected = (of_rows @ inverse @ of_queries.T).float()
    got = influence(total, params, EXAMPLES, QUERIES, curvature, damping=damping, query_loss=mean, chunk_size=2)
    close(got, expected, 1e-3 * float(expected.abs().max()))
    with pytest.raises(fgpt.InputError, match="damping is 0: expected a positive number"):
        influence(total, params, EXAMPLES, QUERIES, curvature, damping=0)


def test_tracin_adds_points_by_their_rates():
    got = tracin(total, POINTS, EXAMPLES, QUERIES, lrs=[0.1, 0.3], query_loss=mean)
    close(got, 0.1 * products(POINTS[0]) + 0.3 * products(POINTS[1]), 1e-4)


def test_a_small_step_on_an_example_lowers_a_query_by_as_much():
    """What the sum means: to first order in the rate."""
    params, lr = POINTS[0], 1e-5
    before = mean(params, QUERIES[1])
    after = mean(tree_map(lambda x, g: x - lr * g, params, grad(total)(params, EXAMPLES[2])), QUERIES[1])
    got = tracin(total, [params], EXAMPLES[2:3], QUERIES[1:2], lrs=[lr], query_loss=mean)
    assert float(before - after) == pytest.approx(float(got), rel=0.05)


@given(st.integers(3, 12), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_lds_is_scipys_rank_correlation(subsets: int, queries: int, tied: bool, seed: int):
    rng = fgpt.key(seed)
    effects, row_weights = torch.randn(queries, 7, generator=rng), (torch.rand(subsets, 7, generator=rng) > 0.3).float()
    losses = torch.randn(subsets, queries, generator=rng)
    losses = losses.round() + torch.arange(subsets)[:, None] // 2 if tied else losses
    got, predicted = lds(effects, row_weights, losses), row_weights @ effects.T
    if any(len(x.unique()) < 2 for x in (*predicted.T, *losses.T)):
        return
    expected = [spearmanr(predicted[:, q], losses[:, q]).statistic for q in range(queries)]
    close(got.per_query, torch.tensor(expected), 1e-9)
    assert float(got.aggregate) == pytest.approx(spearmanr(predicted.mean(1), losses.mean(1)).statistic, abs=1e-9)


def test_wrong_arguments():
    with pytest.raises(fgpt.InputError, match="2 points and 1 learning rates"):
        tracin(total, POINTS, EXAMPLES, QUERIES, lrs=[0.1])
    with pytest.raises(fgpt.InputError, match="0 points"):
        tracin(total, [], EXAMPLES, QUERIES)
