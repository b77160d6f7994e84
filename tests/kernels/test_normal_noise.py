"""Normal numbers of a seed: their distribution, and that a seed's are one sequence."""

import math

import pytest
import torch
from builders import close
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from fgpt.kernels.dropout import normal_noise, random_bits

N = 1 << 21
MANY = normal_noise(torch.tensor(11), N)


def test_the_distribution_is_the_normal_one():
    """Of two million: four moments, and the share beyond 0, 1, 2, 3, 4 and 4.7 standard deviations on each side."""
    z = MANY.double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - moment) < 5 * math.sqrt(variance / N)
    for bound in (0.0, 1.0, 2.0, 3.0, 4.0, 4.7):
        share = 0.5 * math.erfc(bound / math.sqrt(2))
        for side in (z, -z):
            assert abs(int((side > bound).sum()) - share * N) < 5 * math.sqrt(share * N)


def test_numbers_are_independent_of_their_neighbors_and_of_other_seeds():
    others = [normal_noise(torch.tensor(seed), N) for seed in (10, 12, 11 + (1 << 30))]
    for other in (*others, *(MANY.roll(shift) for shift in (1, 2, 64)), MANY.roll(N // 2)):
        for first, second in ((MANY, other), (MANY.square() - 1, other.square() - 1)):
            correlation = float((first * second).mean() / (first.std() * second.std()))
            assert abs(correlation) < 5 * math.sqrt(2 / N)


@given(st.integers(0, 2**31 - 1), st.integers(0, 10**6), st.integers(1, 50))
def test_each_number_is_that_of_box_and_muller(seed: int, first: int, count: int):
    """In Python's floats, from the bits of two rows of the table; the sequence goes on where another one ended."""
    pairs = range(first // 2, (first + count) // 2 + 1)
    bits = random_bits(torch.tensor(seed), 2, len(pairs), pairs.start).long()
    expected: list[float] = []
    for a, b in bits.T.tolist():
        u, v = ((x + 2**31 + 0.5) / 2**32 for x in (a, b))
        radius = math.sqrt(-2 * math.log(u))
        expected += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    got = normal_noise(torch.tensor(seed), count, first)
    close(got, torch.tensor(expected[first % 2 :][:count]), 1e-4, 1e-5)
    split = count // 2
    assert torch.equal(normal_noise(torch.tensor(seed), split, first), got[:split])
    assert torch.equal(normal_noise(torch.tensor(seed), count - split, first + split), got[split:])


def test_the_extreme_bits_give_finite_numbers(monkeypatch: pytest.MonkeyPatch):
    """The least make the largest number there is, and the largest none that is negative under the root."""
    for bits, expected in ((-(2**31), math.sqrt(2 * 33 * math.log(2))), (2**31 - 1, 0.0)):
        table = torch.tensor([[bits], [-(2**31)]])
        monkeypatch.setattr("fgpt.kernels.dropout.random_bits", lambda *_, table=table: table)
        assert float(normal_noise(torch.tensor(0), 1)) == pytest.approx(expected, abs=1e-3)


def test_a_mapped_seed_draws_for_each_member():
    seeds = torch.tensor([3, 4])
    got = vmap(lambda seed: normal_noise(seed, 5, 2))(seeds)
    assert torch.equal(got, torch.stack([normal_noise(seed, 5, 2) for seed in seeds]))
