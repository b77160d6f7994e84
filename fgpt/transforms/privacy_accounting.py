"""What ε a private training has spent, and how much noise a given ε needs: by the accountant of dp-accounting.

    N(0, σ²C²) on a sum of rows of norm ≤ C, each drawn with probability q, in T steps        is (ε, δ)-private

for adding or removing one row. The accountant composes the privacy loss distribution of a step with itself, rounded to
the safe side. It comes with `pip install 'fgpt[privacy]'`.

Source: Koskela et al. 2020; Doroshenko et al. 2022, "Connect the Dots", on which dp-accounting is built.
"""

import math
from typing import Any

from fgpt.errors import InputError
from fgpt.extras import require_extra

INTERVAL = 1e-4
"""Of the grid of privacy losses: dp-accounting's default."""
SIGMA_PRECISION = 1e-6
"""Relative, of a noise multiplier that is searched for."""


def spent_epsilon(noise_multiplier: float, *, delta: float, sampling_rate: float, steps: int) -> float:
    """ε at δ of a training so far.

    Args:
        noise_multiplier: σ.
        delta: δ.
        sampling_rate: q, the probability of each row to be in a step.
        steps: T, the number of steps taken.

    Raises:
        InputError: for numbers out of their range, and without dp-accounting.

    >>> round(spent_epsilon(1.0, delta=1e-5, sampling_rate=1.0, steps=1), 2)
    4.38
    """
    if not noise_multiplier > 0:
        raise InputError(f"noise_multiplier is {noise_multiplier}: expected a positive number")
    if steps < 0:
        raise InputError(f"steps is {steps}: expected 0 or more")
    _check(delta, sampling_rate)
    return 0.0 if steps == 0 else _epsilon(noise_multiplier, delta, sampling_rate, steps, INTERVAL)


def find_noise_multiplier(epsilon: float, *, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest σ, to six digits, whose training has at most this ε at δ.

    Args:
        epsilon: ε.
        delta: δ.
        sampling_rate: q, the probability of each row to be in a step.
        steps: T, the number of steps of the whole training.

    Raises:
        InputError: for numbers out of their range, for a δ that needs no noise, and without dp-accounting.

    >>> sigma = find_noise_multiplier(3.0, delta=1e-3, sampling_rate=1.0, steps=1)
    >>> round(sigma, 3), round(spent_epsilon(sigma, delta=1e-3, sampling_rate=1.0, steps=1), 3)
    (1.037, 3.0)
    """
    if not 0 < epsilon < math.inf:
        raise InputError(f"epsilon is {epsilon}: expected a positive number")
    if steps < 1:
        raise InputError(f"steps is {steps}: expected 1 or more")
    _check(delta, sampling_rate)
    # Without noise, what a row changes is seen with the probability that a step reads it: from this δ on, ε is 0.
    read = 1 - (1 - sampling_rate) ** steps
    if delta >= read:
        raise InputError(
            f"delta {delta:g} is not below the probability {read:g} that a row is read at all, so that no noise is"
            " needed: give a smaller delta, such as 1e-5"
        )
    dp = _dp_accounting()
    # A search is ten evaluations of 1 / interval points each; a grid this coarse overstates ε by less than 1e-3.
    interval = INTERVAL * max(1.0, min(10.0, 2 * epsilon, 300 / math.sqrt(steps)))

    def spent(sigma: float) -> float:
        return _epsilon(sigma, delta, sampling_rate, steps, interval)

    high = 1.0
    while spent(high) > epsilon:
        high *= 2
    low = high / 2
    while spent(low) <= epsilon:
        high, low = low, low / 2
    sigma = dp.calibrate_dp_mechanism(
        lambda: dp.pld.PLDAccountant(value_discretization_interval=interval),
        lambda sigma: _event(sigma, sampling_rate, steps),
        epsilon,
        delta,
        dp.mechanism_calibration.ExplicitBracketInterval(low, high),
        tol=SIGMA_PRECISION * low / 2,
    )
    digits = 6 - math.ceil(math.log10(sigma))
    return math.ceil(sigma * 10**digits) / 10**digits


def _epsilon(sigma: float, delta: float, sampling_rate: float, steps: int, interval: float) -> float:
    accountant = _dp_accounting().pld.PLDAccountant(value_discretization_interval=interval)
    return float(accountant.compose(_event(sigma, sampling_rate, steps)).get_epsilon(delta))


def _event(sigma: float, sampling_rate: float, steps: int) -> Any:
    """A training, as dp-accounting names it."""
    dp = _dp_accounting()
    step = dp.PoissonSampledDpEvent(sampling_rate, dp.GaussianDpEvent(sigma))
    return dp.SelfComposedDpEvent(step, steps)


def _check(delta: float, sampling_rate: float) -> None:
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta}: expected a number above 0, below 1, such as 1e-5")
    if not 0 < sampling_rate <= 1:
        raise InputError(f"sampling_rate is {sampling_rate}: expected a probability above 0, at most 1")


def _dp_accounting() -> Any:
    require_extra("privacy", "private trainings", "dp_accounting")
    import dp_accounting  # here, because importing it takes seconds  # pyright: ignore[reportMissingImports]
    import dp_accounting.pld  # pyright: ignore[reportMissingImports]

    return dp_accounting
