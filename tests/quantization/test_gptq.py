"""GPTQ's roundings are those of the textbook: columns removed one at a time, each choice tried, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from builders.quantized import FORMATS, normal_matrix, signs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgpt import gptq
from fgpt.gptq import (
    Grid,
    Moments,
    inverse_factor,
    least_squares_weight,
    quantize_by_moments,
    round_again,
    round_columns,
    search_scales,
    with_damping,
)
from fgpt.kernels.quantized_linear import Blockwise4bit, Rotated, quantize_matrix, reference

INTEGERS = Grid(torch.arange(-3.0, 4, dtype=torch.float64), torch.arange(7), 4)
ONE = torch.ones((), dtype=torch.float64)


def correlated_moments(width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of inputs that share a few directions."""
    mixing = normal_matrix(width, width, seed=seed) @ torch.diag(torch.logspace(0, -1.5, width))
    x = normal_matrix(4 * width, width, seed=seed + 1) @ mixing.T
    return with_damping((x.T @ x).to(dtype), 0.01)


def objective(q: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """tr (W - Q) H (W - Q)ᵀ, by row."""
    return ((q - w) @ h * (q - w)).sum(-1)


def values(indices: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return grid.levels[indices] * scale


# --------------------------------------------------------------------------------------------------------- one sweep


def test_two_columns_by_hand():
    """q₁ = 0 leaves an error of 0.4. The second weight takes up 0.4 · H₂₁ / H₂₂ = 0.4 of it: 0.6 is rounded to 1.

    Δ = (-0.4, 0.8) costs Δ H Δᵀ = 0.32 - 0.64 + 0.64 = 0.32. Both weights rounded by themselves are 0, and
    Δ = (-0.4, -0.2) costs 0.32 + 0.16 + 0.04 = 0.52.
    """
    h = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    w, scale = torch.tensor([[0.4, 0.2]], dtype=torch.float64), ONE.expand(1, 2)
    indices = round_columns(w, h, scale, INTEGERS)
    assert values(indices, scale, INTEGERS).tolist() == [[0.0, 1.0]]
    assert objective(values(indices, scale, INTEGERS), w, h).item() == pytest.approx(0.32)
    assert objective(torch.zeros(1, 2, dtype=torch.float64), w, h).item() == pytest.approx(0.52)


def optimal_brain_quantization(w: Tensor, h: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The indices, with an inverse of its own for what is left after each column (Frantar et al. 2022, equation 2)."""
    w = w.clone()
    indices = torch.empty(w.shape, dtype=torch.int64)
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        distances = (w[:, j, None] - grid.levels * scale[:, j, None]).abs()
        indices[:, j] = distances.argmin(-1)
        error = w[:, j] - grid.levels[indices[:, j]] * scale[:, j]
        w[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return indices


@pytest.mark.parametrize("width", [12, 100])
def test_codes_are_those_of_the_textbook(width: int):
    h, w = correlated_moments(width), 2 * normal_matrix(6, width, seed=3).double()
    scale = 0.5 + torch.rand(6, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    indices = round_columns(w, h, scale, INTEGERS)
    assert torch.equal(indices, optimal_brain_quantization(w, h, scale, INTEGERS))
    assert not torch.equal(indices, INTEGERS.nearest(w / scale))


def test_the_factor_is_that_of_the_inverse():
    h = correlated_moments(20)
    u = inverse_factor(h)
    torch.testing.assert_close(u.T @ u, torch.linalg.inv(h), rtol=1e-9, atol=1e-12)
    assert torch.equal(u, u.triu())


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_of_uncorrelated_inputs_the_codes_are_plain_ones(format: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gptq, "SCALE_FRACTIONS", (1.0,))
    w, moments = normal_matrix(5, 128), Moments(3 * torch.eye(128), torch.zeros(128, 128))
    plain = quantize_matrix(w, format, double_quant=False)
    result = quantize_by_moments(w, moments, quantize_matrix(w[:1], format, double_quant=False), sweeps=2)
    assert torch.equal(result.codes, plain.codes)
    assert torch.equal(result.absmax, plain.absmax)  # pyright: ignore[reportArgumentType]


def test_the_level_is_the_nearest_where_the_plain_operator_comes_close():
    """bitsandbytes' search in the code of 256 values ends beside the nearest of them now and then."""
    w, moments = normal_matrix(40, 128), Moments(torch.eye(128), torch.zeros(128, 128))
    plain = quantize_matrix(w, "blockwise8")
    result = quantize_by_moments(w, moments, quantize_matrix(w[:1], "blockwise8"), sweeps=0)
    assert ((reference(result) - w).abs().sum() < (reference(plain) - w).abs().sum()).item()
    assert (result.codes == plain.codes).float().mean() > 0.5


# ------------------------------------------------------------------------------------------------- coordinate descent


def best_columns(indices: Tensor, w: Tensor, h: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Every level is tried in every column."""
    indices = indices.clone()
    for j in range(w.shape[1]):
        objectives: list[Tensor] = []
        for level in range(len(grid.levels)):
            trial = indices.clone()
            trial[:, j] = level
            objectives.append(objective(values(trial, scale, grid), w, h))
        indices[:, j] = torch.stack(objectives).argmin(0)
    return indices


@pytest.mark.parametrize("width", [12, 70])
def test_each_column_is_the_best_while_the_others_are_as_they_are(width: int):
    h, w = correlated_moments(width, seed=5), 2 * normal_matrix(4, width, seed=6).double()
    scale = ONE.expand(4, width)
    first = INTEGERS.nearest(w)
    second = round_again(first, w, h, scale, INTEGERS)
    assert torch.equal(second, best_columns(first, w, h, scale, INTEGERS))
    assert not torch.equal(second, first)


@given(seed=st.integers(0, 10**6), width=st.integers(1, 20))
def test_coordinate_descent_never_makes_it_worse(seed: int, width: int):
    h, w = correlated_moments(width, seed), 2 * normal_matrix(3, width, seed=seed + 9).double()
    scale = ONE.expand(3, width)
    indices = round_columns(w, h, scale, INTEGERS)
    again = round_again(indices, w, h, scale, INTEGERS)
    before, after = (objective(values(x, scale, INTEGERS), w, h) for x in (indices, again))
    assert (after <= before + 1e-9 * before.max()).all()


# ------------------------------------------------------------------------------------------------- weights and scales


def test_the_weight_that_is_rounded_is_that_of_least_squares():
    """argmin ‖X Wᵀ - X̂ W*ᵀ‖² + λ ‖W* - W‖², by the rows of one stacked problem."""
    x, w = normal_matrix(40, 6).double(), normal_matrix(3, 6, seed=1).double()
    x_quantized = x + 0.3 * normal_matrix(40, 6, seed=2).double()
    h = with_damping(x_quantized.T @ x_quantized, 0.1)
    damping = (h - x_quantized.T @ x_quantized)[0, 0].sqrt() * torch.eye(6, dtype=torch.float64)
    inputs, outputs = torch.cat([x_quantized, damping]), torch.cat([x @ w.T, damping @ w.T])
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    moments = Moments(h, (x - x_quantized).T @ x_quantized)
    torch.testing.assert_close(least_squares_weight(w, moments), expected)
    assert (expected - w).abs().max() > 0.01


def test_scales_are_the_best_of_their_fractions():
    w, importance = normal_matrix(3, 8).double(), torch.rand(8, generator=torch.Generator().manual_seed(1)).double()
    scales = search_scales(w, importance, INTEGERS._replace(levels=INTEGERS.levels / 3))
    assert scales.shape == (3, 2)
    for row in range(3):
        for block in range(2):
            part = slice(4 * block, 4 * block + 4)
            largest = w[row, part].abs().max()
            errors: dict[float, float] = {}
            for fraction in gptq.SCALE_FRACTIONS:
                step = fraction * largest / 3
                rounded = (w[row, part] / step).round().clamp(-3, 3) * step
                errors[fraction] = float(((rounded - w[row, part]) ** 2 * importance[part]).sum())
            assert scales[row, block].item() == pytest.approx(min(errors, key=lambda x: errors[x]) * largest.item())
    assert len({round(x, 6) for x in (scales.flatten() / w.view(3, 2, 4).abs().amax(-1).flatten()).tolist()}) > 1


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_closer_by_its_inputs_than_rounding_is(format: Any):
    w, h = normal_matrix(24, 128), correlated_moments(128, dtype=torch.float32)
    plain = quantize_matrix(w, format)
    result = quantize_by_moments(w, Moments(h, torch.zeros(128, 128)), quantize_matrix(w[:1], format), sweeps=2)
    assert type(result) is type(plain)
    errors = [objective(reference(x), w, h).sum().item() for x in (result, plain)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_rotated_matrix_is_chosen_by_the_moments_of_its_rotated_input(format: Any):
    """As the plain matrix W R is by the moments of x R, computed apart; and so that it is closer to W by those of x."""
    w, x = normal_matrix(24, 128), normal_matrix(600, 128, seed=1) @ normal_matrix(128, 128, seed=2)
    r = torch.block_diag(*2 * [signs(64) / 8])
    drift = 0.01 * normal_matrix(128, 128, seed=3)
    first_row = quantize_matrix((w @ r)[:1], format)
    moments = Moments(with_damping(x.T @ x, 0.01), drift)
    result = quantize_by_moments(w, moments, Rotated(first_row, 64), sweeps=1)
    of_rotated = Moments(r.T @ moments.h @ r, r.T @ drift @ r)
    expected = quantize_by_moments(w @ r, of_rotated, first_row, sweeps=1)
    assert isinstance(result, Rotated)
    differs = (reference(result.base) - reference(expected)).abs() > 1e-6
    assert differs.float().mean() < 0.02  # two sums in another order, at ties
    plain = Rotated(quantize_matrix(w @ r, format), 64)
    errors = [objective(reference(q), w, moments.h).sum().item() for q in (result, plain)]
    assert errors[0] < 0.6 * errors[1]


def test_an_input_that_is_always_zero_is_rounded_by_itself():
    w, h = normal_matrix(4, 64), correlated_moments(64, dtype=torch.float32)
    is_dead = torch.zeros(64, dtype=torch.bool)
    is_dead[[3, 40]] = True
    h[is_dead] = h[:, is_dead] = 0
    first_row = quantize_matrix(w[:1], "nf4", double_quant=False)
    result = quantize_by_moments(w, Moments(with_damping(h, 0.01), torch.zeros(64, 64)), first_row, sweeps=1)
    assert isinstance(result, Blockwise4bit)
    assert isinstance(result.absmax, Tensor)
    nearest = (w[:, is_dead, None] - result.code * result.absmax[:, None, None]).abs().amin(-1)
    torch.testing.assert_close((reference(result) - w)[:, is_dead].abs(), nearest)
    all_dead = quantize_by_moments(w, Moments(with_damping(0 * h, 0.01), torch.zeros(64, 64)), first_row, sweeps=1)
    assert torch.equal(all_dead.codes, quantize_by_moments(w, Moments(torch.eye(64), 0 * h), first_row, 1).codes)


def test_a_row_of_zeros_stays_so():
    w = normal_matrix(4, 64) * torch.tensor([1.0, 0, 1, 1])[:, None]
    h = correlated_moments(64, dtype=torch.float32)
    result = quantize_by_moments(w, Moments(h, torch.zeros(64, 64)), quantize_matrix(w[:1], "nf4", False), sweeps=2)
    assert (reference(result)[1] == 0).all()
    assert reference(replace(result, dtype=torch.float32)).isfinite().all()
