"""Eigenvalues of a symmetric operator, such as those of `fgpt.transforms.curvature`, from products alone.

    M Q = Q T + β q eᵀ        Lanczos: Q orthonormal, T tridiagonal with α on its diagonal and β beside it

The eigenvalues of T, the Ritz values, approach the outermost ones of M first. Their distribution, each weighted by the
squared first component of its eigenvector, is a Gauss quadrature of the spectrum of M as the first vector sees it;
averaged over random first vectors, of the spectrum itself.

Source: Golub and Van Loan 2013, "Matrix Computations", section 10.1; Ghorbani et al. 2019, "An Investigation into
Neural Net Optimization via Hessian Eigenvalue Density", section 2; Papyan 2018, "The Full Spectrum of Deepnet Hessians
at Scale".
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.rng import fold_in
from fgpt.transforms.curvature import Operator, Tree
from fgpt.tree import ravel


class Tridiagonal(NamedTuple):
    """What `lanczos` returns: M Q = Q T + β_last q eᵀ.

    Args:
        diagonal: α, in fp64.
        off_diagonal: β, in fp64: the last one leads out of T, to a vector that is not in the basis.
        basis: Qᵀ, one vector a row, in the order of `ravel`.

    >>> Tridiagonal(torch.ones(2), torch.tensor([0.5, 0.0]), torch.eye(2)).matrix()
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """

    diagonal: Float[Tensor, " steps"]
    off_diagonal: Float[Tensor, " steps"]
    basis: Float[Tensor, "steps n"]

    def matrix(self) -> Float[Tensor, "steps steps"]:
        """T."""
        beside = self.off_diagonal[:-1]
        return self.diagonal.diag() + beside.diag(1) + beside.diag(-1)


def lanczos(operator: Operator, like: Tree, rng: torch.Generator, *, num_steps: int = 100) -> Tridiagonal:
    """T and Q after a number of products with the operator, from a random first vector.

    Each new vector is orthogonalized against all earlier ones, twice: without it rounding would let outer eigenvalues
    appear again and again. That takes the memory of `num_steps` vectors: 1 GB for 100 of 2.4 M elements. If the vectors
    so far span an invariant subspace, the next one is random, and β before it is 0.

    Args:
        operator: A symmetric operator.
        like: A tree of the form of its vectors, of n elements. Vectors are in its dtype.
        rng: A key, which draws the first vector.
        num_steps: Products, and the size of T. More than n are n.

    Raises:
        InputError: for a `num_steps` below 1, and as `ravel` does.

    Source: Golub and Van Loan 2013, sections 10.1 and 10.3.

    >>> from fgpt.rng import key
    >>> like = {"x": torch.zeros(3, dtype=torch.float64)}
    >>> scales = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    >>> tridiagonal = lanczos(lambda v: {"x": scales * v["x"]}, like, key(0))
    >>> torch.linalg.eigvalsh(tridiagonal.matrix())
    tensor([1.0000, 2.0000, 5.0000], dtype=torch.float64)
    """
    if num_steps < 1:
        raise InputError(f"num_steps is {num_steps}: expected 1 or more")
    vector, unravel = ravel(like)
    vector = at_least_fp32(vector)
    num_steps = min(num_steps, len(vector))
    tolerance = torch.finfo(vector.dtype).eps
    basis = vector.new_zeros(num_steps, len(vector))
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    rest, beta, scale = vector, vector.new_zeros(()), vector.new_zeros(())
    for step in range(num_steps):
        q = rest / beta if beta > 0 else _random_unit_vector(basis[:step], fold_in(rng, step))
        basis[step] = q
        image = at_least_fp32(ravel(operator(unravel(q)))[0])
        rest = _orthogonalize(image, basis[: step + 1])
        scale = torch.maximum(scale, image.norm())
        beta = rest.norm()
        beta = torch.where(beta > tolerance * scale, beta, 0.0)  # less is rounding error: the subspace is invariant
        diagonal.append(q @ image)
        off_diagonal.append(beta)
    return Tridiagonal(torch.stack(diagonal).double(), torch.stack(off_diagonal).double(), basis)


def _random_unit_vector(basis: Float[Tensor, "steps n"], rng: torch.Generator) -> Float[Tensor, " n"]:
    """A random vector orthogonal to those of `basis`."""
    x = torch.randn(basis.shape[1], generator=rng, device=rng.device, dtype=basis.dtype).to(basis.device)
    x = _orthogonalize(x, basis)
    return x / x.norm()


def _orthogonalize(x: Float[Tensor, " n"], basis: Float[Tensor, "steps n"]) -> Float[Tensor, " n"]:
    """The part of x that is orthogonal to the rows of `basis`."""
    for _ in range(2):  # once leaves what cancellation has rounded
        x = x - (basis @ x) @ basis
    return x


class Eigenpairs(NamedTuple):
    """What `top_eigenpairs` returns, the largest eigenvalue first.

    Args:
        values: The eigenvalues, in fp64.
        vectors: Their eigenvectors, of norm 1: a tree with a leading axis of k.
        residuals: ‖M x - λ x‖ of each, in fp64: an eigenvalue of M is no farther from λ than this.

    >>> Eigenpairs(torch.tensor([2.0]), {"x": torch.tensor([[0.6, 0.8]])}, torch.tensor([0.0])).values
    tensor([2.])
    """

    values: Float[Tensor, " k"]
    vectors: Tree
    residuals: Float[Tensor, " k"]


def top_eigenpairs(operator: Operator, like: Tree, rng: torch.Generator, *, k: int, num_steps: int = 100) -> Eigenpairs:
    """The k largest eigenvalues and their eigenvectors. Those of -M are the smallest of M, with the other sign.

    `residuals` say how far each has converged. With fewer than n steps an eigenvalue that occurs several times may be
    found once.

    Args:
        operator: A symmetric operator M.
        like: A tree of the form of its vectors, of n elements.
        rng: A key, which draws the first vector.
        k: How many.
        num_steps: Products: the more, the closer. n are exact.

    Raises:
        InputError: if k is not from 1 to `num_steps` and n, and as `lanczos` does.

    Source: Golub and Van Loan 2013, section 10.1, for the residuals.

    >>> from fgpt.rng import key
    >>> scales = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    >>> like = {"x": torch.zeros(3, dtype=torch.float64)}
    >>> values, vectors, _ = top_eigenpairs(lambda v: {"x": scales * v["x"]}, like, key(0), k=2)
    >>> values, vectors["x"].abs().round(decimals=6)
    (tensor([5.0000, 2.0000], dtype=torch.float64), tensor([[0., 0., 1.],
            [0., 1., 0.]], dtype=torch.float64))
    """
    vector, unravel = ravel(like)
    most = min(num_steps, len(vector))
    if not 1 <= k <= most:
        raise InputError(f"k is {k}: expected 1 to {most}, the number of steps or of elements")
    tridiagonal = lanczos(operator, like, rng, num_steps=num_steps)
    values, vectors = torch.linalg.eigh(tridiagonal.matrix())
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    residuals = (tridiagonal.off_diagonal[-1] * vectors[-1]).abs()
    return Eigenpairs(values, vmap(unravel)(vectors.T.to(tridiagonal.basis.dtype) @ tridiagonal.basis), residuals)


class SpectralDensity(NamedTuple):
    """What `spectral_density` returns: a quadrature of the spectrum for each first vector.

    Args:
        values: The Ritz values.
        weights: The share of the spectrum that each stands for; those of a probe add up to 1.

    >>> density = SpectralDensity(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.9, 0.1]]))
    >>> density.at(torch.tensor([0.0, 1.0]), width=0.1)
    tensor([3.5905, 0.3989])
    """

    values: Float[Tensor, "probes steps"]
    weights: Float[Tensor, "probes steps"]

    def at(self, points: Float[Tensor, " m"], width: float) -> Float[Tensor, " m"]:
        """The density, each value blurred to a normal distribution. It integrates to 1.

        Args:
            points: Where.
            width: The standard deviation of the normal distributions.
        """
        distances = (points[:, None, None].to(self.values.dtype) - self.values) / width
        heights = torch.exp(-distances.square() / 2) / (width * math.sqrt(2 * math.pi))
        return (self.weights * heights).sum(-1).mean(-1)


def spectral_density(
    operator: Operator, like: Tree, rng: torch.Generator, *, num_probes: int = 4, num_steps: int = 100
) -> SpectralDensity:
    """The distribution of all eigenvalues, by stochastic Lanczos quadrature: for any function f

        tr f(M) / n  ≈  mean over probes of Σ_i weight_i f(value_i)

    which is exact for polynomials of degree below 2 `num_steps` but for the choice of probes. The share of an isolated
    eigenvalue, which is 1/n, is drawn at random; where it lies is not.

    Args:
        operator: A symmetric operator M.
        like: A tree of the form of its vectors, of n elements.
        rng: A key: probe p is drawn from fold_in(rng, p).
        num_probes: Random first vectors.
        num_steps: Products for each.

    Raises:
        InputError: for a `num_probes` below 1, and as `lanczos` does.

    Source: Ghorbani et al. 2019, section 2.

    >>> from fgpt.rng import key
    >>> scales, like = torch.tensor([1.0, 2.0, 6.0]), {"x": torch.zeros(3)}
    >>> values, weights = spectral_density(lambda v: {"x": scales * v["x"]}, like, key(0), num_probes=400)
    >>> bool(((values * weights).sum(-1).mean() - 3).abs() < 0.2)  # the mean eigenvalue is 3
    True
    """
    if num_probes < 1:
        raise InputError(f"num_probes is {num_probes}: expected 1 or more")
    values: list[Tensor] = []
    weights: list[Tensor] = []
    for probe in range(num_probes):
        tridiagonal = lanczos(operator, like, fold_in(rng, probe), num_steps=num_steps)
        ritz_values, vectors = torch.linalg.eigh(tridiagonal.matrix())
        values.append(ritz_values)
        weights.append(vectors[0].square())
    return SpectralDensity(torch.stack(values), torch.stack(weights))
