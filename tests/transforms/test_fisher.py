"""Fisher matrices equal those of a loop of outer products, in float64; estimates of a diagonal are near it."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import close, same, tiny, tokens, with_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

import fgpt
from fgpt.losses import Batch
from fgpt.transforms.curvature import ggn_operator, to_matrix
from fgpt.transforms.fisher import (
    empirical_fisher_diagonal,
    empirical_fisher_operator,
    fisher_diagonal,
    fisher_sample,
)
from fgpt.tree import astype, ravel, tree_map

BASE = astype(tree_map(lambda x: 0.5 * x, tiny(n_layer=1)), torch.float64)
ADAPTERS: Any = with_noise(astype(fgpt.lora(BASE, fgpt.key(0), 1, target=r".*\.(q|v)"), torch.float64), 0.2)


def example(width: int, seed: int) -> Batch:
    text = tokens(31, 1, width + 1, seed=seed)
    return Batch(text[:, :-1], text[:, 1:], torch.rand(1, width, generator=fgpt.key(seed)))


def loss(adapters: Any, row: Batch) -> Tensor:
    return fgpt.nll(fgpt.adapt(BASE, adapters), row)[0]


@settings(max_examples=10)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.sampled_from([None, 1, 2]))
def test_the_empirical_fisher_is_the_mean_of_outer_products(widths: list[int], chunk_size: int | None):
    examples = [example(width, i) for i, width in enumerate(widths)]
    gradients = torch.stack([ravel(grad(loss)(ADAPTERS, row))[0] for row in examples])
    expected = gradients.T @ gradients / len(examples)
    operator = empirical_fisher_operator(loss, ADAPTERS, examples, chunk_size=chunk_size)
    close(to_matrix(operator, ADAPTERS), expected, 1e-10)
    v = with_noise(ADAPTERS, 1.0)
    close(ravel(operator(v))[0], expected @ ravel(v)[0], 1e-10)
    diagonal = empirical_fisher_diagonal(loss, ADAPTERS, examples, chunk_size=chunk_size)
    close(ravel(diagonal)[0], expected.diag(), 1e-10)


def test_the_diagonal_of_half_precision_neither_overflows_nor_vanishes():
    for number in (300.0, 1e-4):
        row = Batch(torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), torch.full((1, 4), number))

        def dot(params: Any, x: Batch) -> Tensor:
            return (params["w"] * x.weights.to(params["w"].dtype)).sum()

        diagonal = empirical_fisher_diagonal(dot, {"w": torch.zeros(1, 4, dtype=torch.float16)}, [row])
        assert diagonal["w"].dtype == torch.float32
        assert diagonal["w"][0, 0].item() == pytest.approx(number**2, rel=1e-2)


TEXT = tokens(31, 6)
WEIGHTS = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.1], dtype=torch.float64)


def logits(adapters: Any) -> Tensor:
    return fgpt.apply(fgpt.adapt(BASE, adapters), TEXT[:-1])


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_diagonal_is_that_of_the_gauss_newton_matrix(weights: Tensor | None):
    """Within the standard error that it states, of each element: 4.5 of them for 64 elements."""

    def cross_entropy(z: Tensor) -> Tensor:
        nll = F.cross_entropy(z, TEXT[1:], reduction="none")
        return nll.sum() if weights is None else (weights * nll).sum()

    expected = to_matrix(ggn_operator(logits, cross_entropy, ADAPTERS), ADAPTERS).diag()
    count = 600
    got, _ = ravel(fisher_diagonal(logits, ADAPTERS, fgpt.key(3), weights=weights, num_samples=count))
    errors = (got - expected) / expected
    assert float(errors.abs().max()) < 4.5 * math.sqrt(2 / count)
    assert float(errors.abs().max()) > 0.1 * math.sqrt(2 / count)  # and is an estimate


def test_samples_have_the_covariance_of_labels():
    z = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    p = z.softmax(-1)
    expected = p.diag() - torch.outer(p, p)
    samples = fisher_sample(z.expand(40_000, 4), fgpt.key(0))
    close(samples.T @ samples / len(samples), expected, 0.01)
    close(samples.mean(0), torch.zeros(4).double(), 0.01)
    close(samples.sum(-1), torch.zeros(40_000).double(), 1e-12)  # no gradient moves all logits of a position
    doubled = fisher_sample(z.expand(40_000, 4), fgpt.key(0), torch.full((40_000,), 4.0, dtype=torch.float64))
    close(doubled, 2 * samples, 1e-12)


def test_a_key_is_read_and_not_advanced():
    key = fgpt.key(0)
    first, second = (fisher_diagonal(logits, ADAPTERS, key, num_samples=1) for _ in range(2))
    assert same(first, second)
    assert not same(first, fisher_diagonal(logits, ADAPTERS, fgpt.key(1), num_samples=1))
    z = torch.zeros(3, 5)
    assert torch.equal(fisher_sample(z, key), fisher_sample(z, key))


def test_several_vectors_by_vmap():
    operator = empirical_fisher_operator(loss, ADAPTERS, [example(4, 0), example(6, 1)])
    many = [with_noise(ADAPTERS, 1.0, seed) for seed in range(3)]
    got = vmap(operator)(tree_map(lambda *xs: torch.stack(xs), *many))
    close(got, tree_map(lambda *xs: torch.stack(xs), *map(operator, many)), 1e-11)


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_the_empirical_diagonal_over_quantized_bases(to: Any):
    """The loop of their own gradients; of int8, whose derivatives may be rounded to bf16, within 5 %."""
    base = fgpt.quantize(tiny(d_model=64, d_mlp=64), to)
    adapters = with_noise(fgpt.lora(base, fgpt.key(0), 2), 0.05)
    examples = [example(5, 0), example(9, 1)]

    def quantized_loss(a: Any, row: Batch) -> Tensor:
        return fgpt.nll(fgpt.adapt(base, a), row)[0]

    rows = [grad(quantized_loss)(adapters, row) for row in examples]
    expected = torch.stack([ravel(g)[0].square() for g in rows]).mean(0)
    got, _ = ravel(empirical_fisher_diagonal(quantized_loss, adapters, examples))
    assert float((got - expected).norm() / expected.norm()) < (0.05 if to == "int8" else 1e-5)


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_the_diagonal_over_quantized_bases(to: Any):
    """The same samples over the same values; of int8, which rounds its inputs, within 10 %."""
    base = fgpt.quantize(tiny(d_model=64, d_mlp=64), to)
    adapters = with_noise(fgpt.lora(base, fgpt.key(0), 2), 0.05)

    def diagonal(params: Any) -> Tensor:
        def quantized_logits(a: Any) -> Tensor:
            return fgpt.apply(fgpt.adapt(params, a), TEXT[:-1])

        return ravel(fisher_diagonal(quantized_logits, adapters, fgpt.key(0), num_samples=2))[0]

    got, expected = diagonal(base), diagonal(fgpt.merge(base, base="dequantized"))
    assert float((got - expected).norm() / expected.norm()) < (0.1 if to == "int8" else 1e-5)


def test_what_cannot_be_estimated():
    with pytest.raises(fgpt.InputError, match="no examples"):
        empirical_fisher_diagonal(loss, ADAPTERS, [])
    with pytest.raises(fgpt.InputError, match="num_samples is 0"):
        fisher_diagonal(logits, ADAPTERS, fgpt.key(0), num_samples=0)
    with pytest.raises(fgpt.InputError, match="of the form of the params"):
        empirical_fisher_operator(loss, ADAPTERS, [example(4, 0)])({})
