"""Budgets beside closed forms: of the Gaussian mechanism, and of one step on a sampled lot."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fgpt
from fgpt.transforms.privacy_accounting import find_noise_multiplier, spent_epsilon

pytest.importorskip("dp_accounting")


def normal_tail(x: float) -> float:
    """P(Z > x)."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def delta_of_gaussians(epsilon: float, mu: float) -> float:
    """δ(ε) of telling N(μ, 1) from N(0, 1): Balle and Wang 2018, theorem 8."""
    return normal_tail(epsilon / mu - mu / 2) - math.exp(epsilon) * normal_tail(epsilon / mu + mu / 2)


def delta_of_a_sampled_step(epsilon: float, sigma: float, rate: float) -> float:
    """δ(ε) of telling (1 - q) N(0, σ²) + q N(1, σ²) from N(0, σ²), the worse of both directions: the mixture's density
    is more than e^ε times the other's above one point, and less than e^-ε times it below another.
    """
    crossing = math.log((math.exp(epsilon) - 1 + rate) / rate) * sigma**2 + 0.5  # where it is e^ε times
    removed = (
        (1 - rate) * normal_tail(crossing / sigma)
        + rate * normal_tail((crossing - 1) / sigma)
        - math.exp(epsilon) * normal_tail(crossing / sigma)
    )
    if math.exp(-epsilon) <= 1 - rate:
        return removed
    crossing = math.log((math.exp(-epsilon) - 1 + rate) / rate) * sigma**2 + 0.5
    below = 1 - normal_tail(crossing / sigma)
    mixture_below = (1 - rate) * below + rate * (1 - normal_tail((crossing - 1) / sigma))
    return max(removed, below - math.exp(epsilon) * mixture_below)


def epsilon_at(delta: float, delta_of: Callable[[float], float]) -> float:
    """Where a falling δ(ε) is `delta`, by bisection."""
    low, high = 0.0, 200.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(1.0, 1, 1e-5), (5.0, 40, 1e-5), (20.0, 7, 1e-3)])
def test_without_sampling_it_is_the_gaussian_mechanism(sigma: float, steps: int, delta: float):
    expected = epsilon_at(delta, lambda epsilon: delta_of_gaussians(epsilon, math.sqrt(steps) / sigma))
    got = spent_epsilon(sigma, delta=delta, sampling_rate=1.0, steps=steps)
    assert got == pytest.approx(expected, abs=1e-3)
    assert got >= expected - 1e-9  # rounded to the safe side


@pytest.mark.parametrize(("sigma", "rate", "delta"), [(1.0, 0.1, 1e-5), (0.8, 0.3, 1e-3), (3.0, 0.5, 1e-6)])
def test_one_step_on_a_sampled_lot(sigma: float, rate: float, delta: float):
    expected = epsilon_at(delta, lambda epsilon: delta_of_a_sampled_step(epsilon, sigma, rate))
    assert spent_epsilon(sigma, delta=delta, sampling_rate=rate, steps=1) == pytest.approx(expected, abs=1e-3)
    full = epsilon_at(delta, lambda epsilon: delta_of_gaussians(epsilon, 1 / sigma))
    assert expected < 0.95 * full  # sampling adds privacy


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([20, 400]))
def test_the_noise_of_a_budget_spends_it(epsilon: float, rate: float, steps: int):
    sigma = find_noise_multiplier(epsilon, delta=1e-5, sampling_rate=rate, steps=steps)
    spent = spent_epsilon(sigma, delta=1e-5, sampling_rate=rate, steps=steps)
    assert epsilon - 1e-3 < spent <= epsilon
    assert spent_epsilon(sigma, delta=1e-5, sampling_rate=rate, steps=steps // 2) < spent
    assert spent_epsilon(sigma, delta=1e-5, sampling_rate=rate, steps=0) == 0.0


@pytest.mark.slow
def test_a_budget_that_needs_little_noise():
    """Below the first bracket: here one step is sampled so seldom that a third of the usual noise is enough."""
    sigma = find_noise_multiplier(3.0, delta=2e-3, sampling_rate=0.01, steps=1)
    spent = epsilon_at(2e-3, lambda epsilon: delta_of_a_sampled_step(epsilon, sigma, 0.01))
    assert sigma < 0.5
    assert spent == pytest.approx(3.0, abs=1e-2)


def test_numbers_out_of_range():
    good = {"delta": 1e-5, "sampling_rate": 0.1, "steps": 3}
    for name, value, named in (
        ("delta", 0.0, "delta is 0.0"),
        ("delta", 1.0, "delta is 1.0"),
        ("sampling_rate", 0.0, "sampling_rate is 0.0"),
        ("sampling_rate", 1.5, "sampling_rate is 1.5"),
        ("steps", -1, "steps is -1"),
    ):
        for call in (spent_epsilon, find_noise_multiplier):
            with pytest.raises(fgpt.InputError, match=named):
                call(1.0, **good | {name: value})
    for epsilon in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(fgpt.InputError, match="epsilon is"):
            find_noise_multiplier(epsilon, **good)
    with pytest.raises(fgpt.InputError, match="noise_multiplier is 0"):
        spent_epsilon(0.0, **good)
    with pytest.raises(
        fgpt.InputError, match=r"delta 0\.2 is not below the probability 0\.1 that a row is read at all"
    ):
        find_noise_multiplier(1.0, delta=0.2, sampling_rate=0.1, steps=1)
