"""Laplace's approximation beside explicit matrices in float64, integrals by quadrature, and samples."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from builders import close, tiny, tokens, with_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacrev

import fgpt
from fgpt.losses import Batch
from fgpt.transforms.fisher import fisher_diagonal, fisher_sample
from fgpt.transforms.kronecker import kronecker_factors
from fgpt.transforms.laplace import (
    Curvature,
    LogitPosterior,
    diagonal_curvature,
    expected_probs,
    find_prior_precision,
    full_curvature,
    kronecker_curvature,
    log_evidence,
    logit_posteriors,
    sample_params,
)
from fgpt.tree import astype, ravel, tree_leaves, tree_map

CLASSES = 3
BASE = fgpt.with_classification_head(
    astype(tree_map(lambda x: 0.5 * x, tiny(n_layer=1)), torch.float64), CLASSES, fgpt.key(0)
)
HEAD: Any = fgpt.trainable_leaves(BASE, r"head\..*")
LORA: Any = with_noise(astype(fgpt.lora(BASE, fgpt.key(0), 2, target=r".*\.(q|up)"), torch.float64), 0.3)
ADAPTERS = LORA | HEAD


def example(width: int, seed: int) -> Batch:
    """A text whose last token has the weight 1."""
    weights = torch.zeros(1, width, dtype=torch.float64)
    weights[0, -1] = 1.0
    text = tokens(31, 1, width, seed=seed)
    return Batch(text, torch.zeros_like(text), weights)


def batch_logits(adapters: Any, batch: Batch) -> Tensor:
    return (fgpt.apply(fgpt.adapt(BASE, adapters), batch.tokens) * batch.weights[..., None]).sum(-2)


def logits(adapters: Any, row: Batch) -> Tensor:
    return batch_logits(adapters, row)[0]


def jacobian(params: Any, row: Batch, rest: Any) -> Tensor:
    """J [classes n], by reverse mode of torch.func."""
    vector, unravel = ravel(params)
    return jacrev(lambda x: logits(rest | unravel(x), row))(vector)


def gauss_newton(params: Any, rows: list[Batch], rest: Any = None) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        j = jacobian(params, row, rest or {})
        p = logits((rest or {}) | params, row).softmax(-1)
        total = total + j.T @ (p.diag() - torch.outer(p, p)) @ j
    return total


def dense(curvature: Curvature, params: Any) -> Tensor:
    """Q diag(h) Qᵀ, by columns."""
    vector, unravel = ravel(params)
    columns: list[Tensor] = []
    for unit in torch.eye(len(vector), dtype=vector.dtype):
        scaled = tree_map(torch.mul, curvature.eigenvalues, curvature.rotate(unravel(unit)))
        columns.append(ravel(curvature.rotate_back(scaled))[0])
    return torch.stack(columns, 1)


@settings(max_examples=8)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.sampled_from([None, 1, 2]))
def test_diagonal_and_full_curvature_are_those_of_the_gauss_newton_matrix(widths: list[int], chunk_size: int | None):
    rows = [example(width, i) for i, width in enumerate(widths)]
    diagonal = diagonal_curvature(logits, ADAPTERS, rows, chunk_size=chunk_size)
    close(ravel(diagonal.eigenvalues)[0], gauss_newton(ADAPTERS, rows).diag(), 1e-10)
    full = full_curvature(lambda head, row: logits(LORA | head, row), HEAD, rows, chunk_size=chunk_size)
    close(dense(full, HEAD), gauss_newton(HEAD, rows, LORA), 1e-10)


def test_kronecker_curvature_is_the_kronecker_product_of_the_factors():
    """Of one batch those that `kronecker_factors` gives for the same labels, and of the head its diagonal."""
    batch = tree_map(lambda *xs: torch.cat(xs), example(5, 0), example(5, 1))
    rng = fgpt.key(3)
    curvature = kronecker_curvature(batch_logits, ADAPTERS, [batch], rng)
    rng_of_batch = fgpt.fold_in(rng, 0)
    u = fisher_sample(batch_logits(ADAPTERS, batch), fgpt.fold_in(rng_of_batch, 0))
    factors = kronecker_factors(lambda a: (u * batch_logits(HEAD | a, batch)).sum(), LORA)
    of_head = fisher_diagonal(lambda x: batch_logits(LORA | x, batch), HEAD, fgpt.fold_in(rng_of_batch, "diagonal"))
    blocks = [torch.kron(*part) for path in LORA for part in (factors[path].a, factors[path].b)]
    assert list(ADAPTERS) == [*LORA, *HEAD]
    expected = torch.block_diag(*blocks, ravel(of_head)[0].diag())
    close(dense(curvature, ADAPTERS), expected, 1e-10)


def test_kronecker_curvature_of_several_batches_is_that_of_all_rows():
    """Of texts of one token, whose Fisher matrix it is but for the independence of inputs and gradients. That of equal
    rows is exact, up to the labels that are drawn.
    """
    rows, up = [example(1, 0)] * 60, {path: x for path, x in LORA.items() if path.endswith(".up")}
    together = tree_map(lambda *xs: torch.cat(xs), *rows)
    parts = [tree_map(lambda *xs: torch.cat(xs), *rows[:9]), tree_map(lambda *xs: torch.cat(xs), *rows[9:])]
    expected = gauss_newton(up, [example(1, 0)], HEAD) * 60
    blocks = list(torch.tensor([x.numel() for x in tree_leaves(up)]).cumsum(0))
    for i, batches in enumerate(([together], parts)):
        curvature = kronecker_curvature(batch_logits, up | HEAD, batches, fgpt.key(i), num_samples=10)
        matrix = dense(curvature, up | HEAD)
        for start, end in zip([0, *blocks[:-1]], blocks, strict=True):
            block = expected[start:end, start:end]
            close(matrix[start:end, start:end], block, 0.15 * float(block.abs().max()))


@pytest.mark.parametrize("kind", ["diagonal", "full", "kronecker"])
def test_the_covariance_of_logits(kind: str):
    """J (G + λI)⁻¹ Jᵀ, by an explicit inverse."""
    rows = [example(width, width) for width in (2, 7, 4)]
    if kind == "full":
        params, rest = HEAD, LORA
        curvature = full_curvature(lambda head, row: logits(LORA | head, row), HEAD, rows)
    else:
        params, rest = ADAPTERS, {}
        curvature = diagonal_curvature(logits, ADAPTERS, rows)
        if kind == "kronecker":
            curvature = kronecker_curvature(batch_logits, ADAPTERS, rows, fgpt.key(0))
    queries = [example(width, 10 + width) for width in (6, 1, 3)]
    priors, matrix = [0.7, 30.0], dense(curvature, params)
    posteriors = logit_posteriors(
        lambda x, row: logits(rest | x, row), params, curvature, priors, queries, chunk_size=2
    )
    for precision, posterior in zip(priors, posteriors, strict=True):
        inverse = torch.linalg.inv(matrix + precision * torch.eye(len(matrix), dtype=matrix.dtype))
        for i, row in enumerate(queries):
            j = jacobian(params, row, rest)
            close(posterior.mean[i], logits(rest | params, row), 1e-10)
            close(posterior.covariance[i], j @ inverse @ j.T, 1e-9)


def test_over_a_quantized_base_in_single_precision():
    """The diagonal over NF4 is that over the dequantized base."""
    base = fgpt.with_classification_head(tiny(n_layer=1, d_model=64, n_head=2, d_mlp=64), CLASSES, fgpt.key(0))
    quantized = fgpt.quantize(base, "nf4")
    adapters: Any = with_noise(fgpt.lora(base, fgpt.key(0), 2), 0.1)
    rows = [astype(example(width, width), torch.float32) for width in (3, 6)]

    def logits_over(base: fgpt.GPT) -> Any:
        return lambda a, row: (fgpt.apply(fgpt.adapt(base, a), row.tokens) * row.weights[..., None]).sum(-2)[0]

    over = diagonal_curvature(logits_over(quantized), adapters, rows).eigenvalues
    expected = diagonal_curvature(logits_over(fgpt.merge(quantized, base="dequantized")), adapters, rows).eigenvalues
    scale = float(ravel(expected)[0].max())
    close(ravel(over)[0], ravel(expected)[0], 1e-4 * scale)


def test_adapters_in_half_precision_have_a_curvature_in_single():
    base = fgpt.with_classification_head(tiny(n_layer=1), CLASSES, fgpt.key(0))
    adapters: Any = astype(with_noise(fgpt.lora(base, fgpt.key(0), 2, target=r".*\.up"), 0.1), torch.bfloat16)
    rows = [astype(example(width, width), torch.float32) for width in (3, 6)]

    def all_logits(a: Any, batch: Batch) -> Tensor:
        return (fgpt.apply(fgpt.adapt(base, a), batch.tokens) * batch.weights[..., None]).sum(-2)

    curvature = kronecker_curvature(all_logits, adapters, rows, fgpt.key(0))
    assert {x.dtype for x in tree_leaves(curvature.eigenvalues)} == {torch.float32}
    (posterior,) = logit_posteriors(lambda a, row: all_logits(a, row)[0], adapters, curvature, [1.0], rows)
    assert (posterior.covariance.diagonal(dim1=1, dim2=2) > 0).all()
    sample = sample_params(adapters, curvature, 1.0, fgpt.key(0))
    assert {x.dtype for x in tree_leaves(sample)} == {torch.bfloat16}


@settings(max_examples=20)
@given(st.floats(0.1, 30.0), st.floats(-3.0, 3.0), st.floats(0.05, 20.0), st.floats(-2.0, 2.0))
def test_the_evidence_of_a_gaussian_likelihood_is_the_integral(h: float, peak: float, precision: float, mean: float):
    """∫ N(θ; θ_0, 1/λ) exp(-h/2 (θ - peak)²) dθ, exact at the posterior's mode."""
    mode = (h * peak + precision * mean) / (h + precision)
    grid = np.linspace(mode - 40, mode + 40, 400_001)
    prior = np.sqrt(precision / (2 * math.pi)) * np.exp(-precision / 2 * (grid - mean) ** 2)
    integral = np.trapezoid(prior * np.exp(-h / 2 * (grid - peak) ** 2), grid)
    curvature = Curvature(torch.tensor([h], dtype=torch.float64), lambda x: x, lambda x: x)
    theta = torch.tensor([mode], dtype=torch.float64)
    log_likelihood = torch.tensor(-h / 2 * (mode - peak) ** 2, dtype=torch.float64)
    prior_mean = torch.tensor([mean], dtype=torch.float64)
    got = log_evidence(log_likelihood, theta, curvature, precision, prior_mean=prior_mean)
    assert float(got) == pytest.approx(math.log(integral), rel=1e-5, abs=1e-6)


@settings(max_examples=20)
@given(st.lists(st.floats(0.0, 1e4), min_size=1, max_size=5), st.floats(0.01, 10.0), st.floats(1.05, 3.0))
def test_no_other_prior_has_more_evidence(h: list[float], distance: float, factor: float):
    h[0] += 1e-2
    curvature = Curvature(torch.tensor(h, dtype=torch.float64), lambda x: x, lambda x: x)
    params = torch.ones(len(h), dtype=torch.float64)
    mean = params.clone()
    mean[0] -= distance
    best = find_prior_precision(params, curvature, prior_mean=mean)

    def evidence(precision: float) -> float:
        return float(log_evidence(torch.zeros(()), params, curvature, precision, prior_mean=mean))

    assert evidence(best) >= evidence(best * factor) - 1e-9
    assert evidence(best) >= evidence(best / factor) - 1e-9


@settings(max_examples=10)
@given(st.floats(-4.0, 4.0), st.floats(0.0, 30.0))
def test_expected_probabilities_of_two_classes(margin: float, variance: float):
    """The mean of a sigmoid under a normal distribution, by quadrature."""
    posterior = LogitPosterior(torch.tensor([[margin, 0.0]]), torch.tensor([[[variance, 0.0], [0.0, 0.0]]]))
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(80)
    expected = (node_weights / (1 + np.exp(-(margin + math.sqrt(variance) * nodes)))).sum() / math.sqrt(2 * math.pi)
    got = expected_probs(posterior, fgpt.key(0), num_samples=20_000)
    assert float(got.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(got[0, 0]) == pytest.approx(expected, abs=0.015)


def test_samples_have_the_posterior_covariance():
    rows = [example(width, width) for width in (2, 7, 4)]
    curvature = full_curvature(lambda head, row: logits(LORA | head, row), HEAD, rows)
    draws = [ravel(sample_params(HEAD, curvature, 0.5, fgpt.key(i)))[0] for i in range(1000)]
    deviations = torch.stack(draws) - ravel(HEAD)[0]
    matrix = dense(curvature, HEAD)
    expected = torch.linalg.inv(matrix + 0.5 * torch.eye(len(matrix), dtype=matrix.dtype))
    close(deviations.T @ deviations / len(draws), expected, 0.4)
    close(deviations.mean(0), torch.zeros(len(matrix), dtype=matrix.dtype), 0.2)


def test_bad_input():
    curvature = Curvature(torch.tensor([1.0]), lambda x: x, lambda x: x)
    with pytest.raises(fgpt.InputError, match="there are no examples"):
        diagonal_curvature(logits, ADAPTERS, [])
    with pytest.raises(fgpt.InputError, match="there are no batches"):
        kronecker_curvature(batch_logits, ADAPTERS, [], fgpt.key(0))
    with pytest.raises(fgpt.InputError, match=r"a prior precision is 0\.0: expected positive numbers"):
        logit_posteriors(logits, ADAPTERS, curvature, [1.0, 0.0], [example(3, 0)])
    for params, h in ((torch.zeros(1), 1.0), (torch.ones(1), 0.0)):
        with pytest.raises(fgpt.InputError, match="the evidence has no largest value"):
            find_prior_precision(params, Curvature(torch.tensor([h]), lambda x: x, lambda x: x))
