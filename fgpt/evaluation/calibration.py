"""Whether the probabilities of a classifier say how often it is right, and the temperature with which they do.

    ECE = Σ_b n_b / n |accuracy_b - confidence_b|        b: a bin of the confidence, the largest probability
    p_T = softmax(logits / T),  T = argmin Σ -log p_T(y)   on rows that were not trained on

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", sections 2 and 4.2.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.errors import InputError


def expected_calibration_error(
    probs: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], *, num_bins: int = 15
) -> Float[Tensor, ""]:
    """The mean distance of accuracy and confidence, over bins of equal width that lack their lower end.

    Args:
        probs: The probability of each class.
        labels: The true classes.
        num_bins: Bins of [0, 1].

    Raises:
        InputError: if there are no rows.

    >>> probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    >>> expected_calibration_error(probs, torch.tensor([0, 1, 1]))  # (2 |0.5 - 0.9| + |1 - 0.6|) / 3
    tensor(0.4000)
    """
    _check(labels)
    confidence, prediction = probs.max(-1)
    edges = torch.linspace(0, 1, num_bins + 1, device=probs.device, dtype=probs.dtype)
    bins = torch.bucketize(confidence, edges[1:-1])
    gaps = (prediction == labels).to(probs.dtype) - confidence
    return torch.zeros(num_bins).to(probs).index_add(0, bins, gaps).abs().sum() / len(labels)


def find_temperature(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """The temperature of the least negative log-likelihood of the labels, which is convex in 1 / T: by bisection of its
    derivative, to six digits, between 0.01 and 100.

    Args:
        logits: The logits of rows that were not trained on.
        labels: Their true classes.

    Raises:
        InputError: if there are no rows.

    >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])  # right in 3 of 4: 4 / T = log 3
    >>> find_temperature(logits, torch.tensor([0, 0, 1, 1]))
    3.64096
    """
    _check(labels)
    logits = logits.double()
    true_logits = logits.gather(1, labels[:, None])[:, 0]
    low, high = math.log(0.01), math.log(100.0)
    while high - low > 1e-7:
        middle = (low + high) / 2
        expected = ((logits / math.exp(middle)).softmax(-1) * logits).sum(-1)
        too_sure = float((expected - true_logits).sum()) > 0
        low, high = (middle, high) if too_sure else (low, middle)
    return float(f"{math.exp(low):.6g}")


def _check(labels: Tensor) -> None:
    if len(labels) == 0:
        raise InputError("there are no rows: expected one row or more")
