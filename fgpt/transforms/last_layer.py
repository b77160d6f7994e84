"""A Bayesian last layer: the head of a trained classifier, fitted anew with a prior whose precision the data chooses.

    W = argmin Σ_i -log softmax(W h_i)[y_i] + λ/2 ‖W - W_0‖²        features h_i of the training rows, fixed
    λ = Σ h / (h + λ) / ‖W - W_0‖²                                  h: eigenvalues of the curvature G at W

Both are repeated until λ stays. A training that ends with every row learned by heart, as a fine-tuning on few rows
does, leaves no curvature, and the evidence of its weights means little; at the mode it is what it should be.
Predictions are those of `fgpt.transforms.laplace`.

Source: MacKay 1992, "The Evidence Framework Applied to Classification Networks"; Kristiadi et al. 2020, "Being
Bayesian, Even Just a Bit, Fixes Overconfidence in ReLU Networks".
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.transforms.laplace import Curvature, curvature_of_matrix, find_prior_precision

TOLERANCE = 0.01
"""Relative change of λ at which it stays."""


class LastLayer(NamedTuple):
    """What `fit_last_layer` returns.

    Args:
        head: W, the mode.
        curvature: G at W.
        prior_precision: λ.

    >>> LastLayer._fields
    ('head', 'curvature', 'prior_precision')
    """

    head: Float[Tensor, "classes d_model"]
    curvature: Curvature
    prior_precision: float


def fit_last_layer(
    features: Float[Tensor, "n d_model"],
    labels: Int[Tensor, " n"],
    head: Float[Tensor, "classes d_model"],
    *,
    prior_mean: Float[Tensor, "classes d_model"] | None = None,
    max_rounds: int = 20,
) -> LastLayer:
    """The head of the largest evidence.

    It takes memory of (classes · d_model)² numbers in fp64, and a few eigendecompositions of such a matrix.

    Args:
        features: The final hidden state of each training row, such as `fgpt.hidden(params, tokens)[:, -1]`.
        labels: Their classes.
        head: Where the search begins, such as the trained head.
        prior_mean: W_0; None is 0.
        max_rounds: Fits at most, of which each begins where the last one ended.

    Raises:
        InputError: if there are no rows, or λ does not stay, as with rows whose labels are not to be had
            from their features at all.

    >>> rng = torch.Generator().manual_seed(0)
    >>> features = torch.randn(2000, 2, generator=rng)
    >>> labels = ((3 * features[:, 0]).sigmoid() > torch.rand(2000, generator=rng)).long()
    >>> layer = fit_last_layer(features, labels, torch.zeros(2, 2))
    >>> bool((layer.head[1] - layer.head[0] - torch.tensor([3.0, 0.0])).abs().max() < 0.5)
    True
    """
    if len(features) == 0:
        raise InputError("there are no rows: expected one row or more")
    x, start = features.detach().double(), head.detach().double()
    mean = torch.zeros_like(start) if prior_mean is None else prior_mean.detach().double()
    w, precision = start, 1.0
    for _ in range(max_rounds):
        w = _minimize(_objective(x, labels, mean, precision), w)
        curvature = curvature_of_matrix(_gauss_newton(x, w), w.to(head.dtype))
        previous, precision = precision, find_prior_precision(w, curvature, prior_mean=mean)
        if abs(precision / previous - 1) < TOLERANCE:
            return LastLayer(w.to(head.dtype), curvature, previous)  # of which w is the mode
    raise InputError(
        f"the prior's precision does not stay in {max_rounds} rounds, and was {precision:g} at last: expected features"
        " that tell the labels"
    )


def _objective(x: Tensor, labels: Tensor, mean: Tensor, precision: float) -> Callable[[Tensor], Tensor]:
    def objective(w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.T, labels, reduction="sum") + precision / 2 * (w - mean).square().sum()

    return objective


def _minimize(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Of a strictly convex function."""
    w = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=1000, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(w)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]  # a tensor serves as a float
    return w.detach()


def _gauss_newton(x: Float[Tensor, "n d_model"], w: Float[Tensor, "classes d_model"]) -> Float[Tensor, "m m"]:
    """G = Σ_i (diag(p_i) - p_i p_iᵀ) ⊗ h_i h_iᵀ, for the rows of W in turn."""
    p = (x @ w.T).softmax(-1)
    blocks: list[Tensor] = []
    for c in range(len(w)):
        row = -p[:, c, None] * p
        row[:, c] += p[:, c]
        blocks.append(torch.cat([x.T @ (row[:, d, None] * x) for d in range(len(w))], 1))
    return torch.cat(blocks)
