"""Lanczos beside torch.linalg.eigh of the same matrix: values, vectors, bounds, orthogonality, densities."""

from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fgpt
from fgpt.transforms.curvature import hessian, hessian_operator
from fgpt.transforms.spectrum import lanczos, spectral_density, top_eigenpairs
from fgpt.tree import astype, ravel, tree_map

EIGENVALUES = st.lists(st.floats(-5, 5), min_size=1, max_size=24)


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    rotation, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=fgpt.key(seed)).double())
    return rotation @ values.double().diag() @ rotation.T


def as_operator(matrix: Tensor) -> tuple[Any, Any]:
    """It multiplies trees of two leaves; and such a tree."""
    half = len(matrix) // 2
    like = {"a": torch.zeros(half, dtype=matrix.dtype), "b": [torch.zeros(1, len(matrix) - half, dtype=matrix.dtype)]}
    _, unravel = ravel(like)
    return lambda v: unravel(matrix @ ravel(v)[0]), like


@given(EIGENVALUES, st.integers(0, 9))
def test_with_as_many_steps_as_elements_all_eigenvalues_are_exact(values: list[float], seed: int):
    """Repeated ones too, as a subspace that is left to no other vector is followed by a random one."""
    matrix = with_eigenvalues(torch.tensor(values), seed)
    operator, like = as_operator(matrix)
    got = top_eigenpairs(operator, like, fgpt.key(seed), k=len(values), num_steps=len(values) + 3)
    close(got.values, torch.linalg.eigvalsh(matrix).flip(0), 1e-12 * 5)
    vectors = torch.stack([ravel(tree_map(lambda x, i=i: x[i], got.vectors))[0] for i in range(len(values))])
    close(vectors @ vectors.T, torch.eye(len(values)).double(), 1e-12)
    close(matrix @ vectors.T, vectors.T * got.values, 1e-12 * 50)
    assert float(got.residuals.max()) < 1e-12 * 50


def test_fewer_steps_give_the_outer_ones_and_say_how_near():
    values = torch.cat([torch.linspace(-1, 1, 200), torch.tensor([3.0, 5.0, 9.0])])
    matrix = with_eigenvalues(values)
    operator, like = as_operator(matrix)
    got = top_eigenpairs(operator, like, fgpt.key(0), k=8, num_steps=30)
    close(got.values[:3], torch.tensor([9.0, 5.0, 3.0]).double(), 1e-9)
    nearest = (got.values[:, None] - torch.linalg.eigvalsh(matrix)).abs().amin(1)
    assert bool((nearest <= got.residuals + 1e-12).all())
    assert float(got.residuals[7]) > 1e-3  # inner ones have not converged
    vector, _ = ravel(tree_map(lambda x: x[7], got.vectors))
    assert float((matrix @ vector - got.values[7] * vector).norm()) == pytest.approx(float(got.residuals[7]), rel=1e-8)
    negative = top_eigenpairs(lambda v: tree_map(torch.neg, operator(v)), like, fgpt.key(0), k=1, num_steps=60)
    assert float(-negative.values[0]) == pytest.approx(-1.0, abs=1e-3)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_the_basis_stays_orthonormal(dtype: torch.dtype, bound: float):
    """Of a matrix whose largest eigenvalues converge at once, which is where it is lost; and M Q = Q T + β q eᵀ."""
    matrix = with_eigenvalues(10.0 ** torch.linspace(2, -6, 150)).to(dtype)
    operator, like = as_operator(matrix)
    diagonal, off_diagonal, basis = got = lanczos(operator, like, fgpt.key(1), num_steps=60)
    close(basis @ basis.T, torch.eye(60, dtype=dtype), bound)
    rest = matrix @ basis.T - basis.T @ got.matrix().to(dtype)
    assert float(rest[:, :-1].abs().max()) < 100 * bound
    close(rest[:, -1].norm().double(), off_diagonal[-1], 100 * bound)
    assert diagonal.dtype == torch.float64
    assert float((torch.linalg.eigvalsh(got.matrix()) > 99).sum()) == 1  # no copies of the largest


def test_invariant_subspaces():
    """Of zero and of the identity each vector is one; of low rank those that it reaches."""
    for matrix in (torch.zeros(5, 5), torch.eye(5), torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0]).diag()):
        operator, like = as_operator(matrix.double())
        got = top_eigenpairs(operator, like, fgpt.key(0), k=5)
        close(got.values, torch.linalg.eigvalsh(matrix.double()).flip(0), 1e-12)
    assert len(lanczos(operator, like, fgpt.key(0), num_steps=9).diagonal) == 5


def test_a_tensor_is_a_tree():
    got = top_eigenpairs(lambda v: torch.tensor([1.0, 4.0]) * v, torch.zeros(2), fgpt.key(0), k=1)
    close(got.values, torch.tensor([4.0]).double(), 1e-6)
    close(got.vectors.abs(), torch.tensor([[0.0, 1.0]]), 1e-6)


def test_vectors_of_half_precision_are_computed_in_fp32():
    matrix = with_eigenvalues(torch.tensor([8.0, 4.0, 2.0, 1.0])).bfloat16()
    operator, like = as_operator(matrix)
    got = top_eigenpairs(operator, like, fgpt.key(0), k=2)
    close(got.values, torch.tensor([8.0, 4.0]).double(), 0.1)
    assert lanczos(operator, like, fgpt.key(0), num_steps=3).basis.dtype == torch.float32
    assert got.vectors["a"].dtype == torch.bfloat16


def test_a_quadrature_has_the_eigenvalues_as_its_nodes():
    """Weighted by the squares of the first vector's components."""
    matrix = with_eigenvalues(torch.tensor([5.0, 3.0, 1.0, -1.0, -2.0]))
    operator, like = as_operator(matrix)
    values, weights = spectral_density(operator, like, fgpt.key(3), num_probes=3)
    expected, vectors = torch.linalg.eigh(matrix)
    for probe in range(3):
        first = lanczos(operator, like, fgpt.fold_in(fgpt.key(3), probe), num_steps=1).basis[0]
        close(values[probe], expected, 1e-12)
        close(weights[probe], (vectors.T @ first).square(), 1e-12)
    assert not torch.equal(weights[0], weights[1])


def test_a_density_has_the_moments_of_the_spectrum():
    values = torch.cat([torch.linspace(-1, 1, 180), torch.linspace(4, 6, 60)])
    operator, like = as_operator(with_eigenvalues(values))
    density = spectral_density(operator, like, fgpt.key(0), num_probes=40, num_steps=20)
    close(density.weights.sum(-1), torch.ones(40).double(), 1e-12)
    for power in (1, 2, 3):
        moment = float((density.weights * density.values**power).sum(-1).mean())
        assert moment == pytest.approx(float(values.double().pow(power).mean()), rel=0.03, abs=0.02)
    grid = torch.linspace(-4, 9, 2001)
    height = density.at(grid, width=0.2)
    step = float(grid[1] - grid[0])
    assert float(height.sum()) * step == pytest.approx(1.0, abs=1e-6)
    assert float(height[grid > 3].sum()) * step == pytest.approx(0.25, abs=0.02)
    assert float(height[(grid > 2) & (grid < 3)].max()) < 0.01


@pytest.mark.parametrize("to", [None, "nf4", "int8"])
def test_of_a_model_beside_the_dense_hessian(to: Any):
    text = tokens(31, 2, 9)
    batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(2, 8))
    base = tree_map(lambda x: 0.5 * x, tiny(n_layer=1, d_model=64, d_mlp=64))
    base = astype(base, torch.float64) if to is None else fgpt.quantize(base, to)
    adapters = with_noise(fgpt.lora(base, fgpt.key(0), 1, target=r".*\.q"), 0.2)
    adapters = astype(adapters, torch.float64) if to is None else adapters

    def loss(a: Any) -> Tensor:
        return fgpt.loss(fgpt.adapt(base, a), batch)

    expected = torch.linalg.eigvalsh(hessian(loss, adapters).double()).flip(0)[:5]
    got = top_eigenpairs(hessian_operator(loss, adapters), adapters, fgpt.key(1), k=5)
    bound = {None: 1e-10, "nf4": 1e-5, "int8": 1e-2}[to]  # int8 derivatives are rounded to bf16 on many a CPU
    assert float(((got.values - expected) / expected).abs().max()) < bound


def test_wrong_numbers():
    operator, like = as_operator(torch.eye(3))
    for call, says in (
        (lambda: lanczos(operator, like, fgpt.key(0), num_steps=0), "num_steps is 0"),
        (lambda: top_eigenpairs(operator, like, fgpt.key(0), k=4), "k is 4: expected 1 to 3"),
        (lambda: top_eigenpairs(operator, like, fgpt.key(0), k=0), "k is 0"),
        (lambda: spectral_density(operator, like, fgpt.key(0), num_probes=0), "num_probes is 0"),
        (lambda: lanczos(operator, {"a": torch.tensor(1)}, fgpt.key(0)), "floating-point"),
    ):
        with pytest.raises(fgpt.InputError, match=says):
            call()
