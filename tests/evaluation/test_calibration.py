"""Calibration errors by a loop over bins, temperatures by a minimizer."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

import fgpt
from fgpt.evaluation.calibration import expected_calibration_error, find_temperature


@given(st.integers(1, 60), st.integers(2, 5), st.integers(1, 20), st.integers(0, 999))
def test_the_error_is_that_of_a_loop_over_bins(rows: int, classes: int, num_bins: int, seed: int):
    rng = fgpt.key(seed)
    probs = (4 * torch.randn(rows, classes, generator=rng)).double().softmax(-1)
    labels = torch.randint(classes, (rows,), generator=rng)
    error = 0.0
    for b in range(num_bins):
        inside: list[tuple[float, bool]] = []
        for p, label in zip(probs.tolist(), labels.tolist(), strict=True):
            if b / num_bins < max(p) <= (b + 1) / num_bins:
                inside.append((max(p), p.index(max(p)) == label))
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            error += len(inside) / rows * abs(accuracy - confidence)
    got = expected_calibration_error(probs, labels, num_bins=num_bins)
    assert float(got) == pytest.approx(error, abs=1e-9)


@given(st.integers(0, 999), st.floats(0.2, 5.0))
def test_the_temperature_has_the_least_loss(seed: int, scale: float):
    rng = fgpt.key(seed)
    logits = 2 * torch.randn(60, 4, generator=rng).double()
    labels = torch.multinomial((logits / scale).softmax(-1), 1, generator=rng)[:, 0]
    best = minimize_scalar(
        lambda t: float(F.cross_entropy(logits / math.exp(t), labels)),
        bounds=(math.log(0.01), math.log(100.0)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    got = find_temperature(logits, labels)
    assert float(F.cross_entropy(logits / got, labels)) <= best.fun + 1e-9


def test_temperatures_at_the_ends():
    """Where every row is right, no temperature is too low; where every one is wrong, none is too high."""
    logits, labels = torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1])
    assert find_temperature(logits, labels) == pytest.approx(0.01, rel=1e-4)
    assert find_temperature(logits, 1 - labels) == pytest.approx(100.0, rel=1e-4)


def test_no_rows():
    for call in (expected_calibration_error, find_temperature):
        with pytest.raises(fgpt.InputError, match="there are no rows: expected one row or more"):
            call(torch.ones(0, 2), torch.zeros(0, dtype=torch.int64))
