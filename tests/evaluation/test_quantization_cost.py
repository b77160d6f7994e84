"""The cost of a format against plain autograd over dense weights."""

import math

import pytest
import torch
from builders import tiny, tokens

import fgpt
from fgpt.evaluation.quantization_cost import measure_base, quantization_cost
from fgpt.tree import tree_map

pytestmark = pytest.mark.usefixtures("exact_derivatives")

PARAMS = tree_map(lambda x: 0.6 * x, tiny(d_model=64, d_mlp=128))
TEXT = tokens(31, 3, 9)
BATCHES = [
    fgpt.Batch(TEXT[:2, :-1], TEXT[:2, 1:], torch.tensor([[1.0] * 8, [0.0] * 5 + [1.0] * 3])),
    fgpt.Batch(TEXT[2:, :-1], TEXT[2:, 1:], torch.ones(1, 8)),
]


def by_autograd(params: fgpt.GPT) -> tuple[float, dict[str, torch.Tensor]]:
    adapters = fgpt.lora(params, fgpt.key(0), rank=8)
    bs = {path: x.b.requires_grad_() for path, x in adapters.items()}
    sums = [fgpt.nll(fgpt.adapt(params, adapters), batch) for batch in BATCHES]
    loss = (sums[0][0] + sums[1][0]) / (sums[0][1] + sums[1][1])
    return float(loss.detach()), dict(zip(bs, torch.autograd.grad(loss, [*bs.values()]), strict=True))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_loss_and_gradient_are_those_of_one_loss_of_all_batches(format: str) -> None:
    small = fgpt.quantize(PARAMS, format)
    (full_loss, full), (loss, gradient) = by_autograd(PARAMS), by_autograd(small)
    cost = quantization_cost(measure_base(PARAMS, BATCHES), measure_base(small, BATCHES))
    assert math.isclose(cost.full_loss, full_loss, rel_tol=1e-5)
    assert math.isclose(cost.loss, loss, rel_tol=1e-4)
    flat, of_full = (torch.cat([g[path].flatten() for path in full]) for g in (gradient, full))
    assert math.isclose(cost.gradient_error, float((flat - of_full).norm() / of_full.norm()), rel_tol=1e-2)
    assert cost.gradient_error > 1e-3


def test_the_full_base_costs_nothing() -> None:
    measured = measure_base(PARAMS, BATCHES)
    cost = quantization_cost(measured, measured)
    assert cost.loss_increase == cost.gradient_error == 0


def test_without_a_weighted_token_nothing_is_measured() -> None:
    with pytest.raises(fgpt.InputError, match="at least one token with a weight"):
        measure_base(PARAMS, [fgpt.Batch(TEXT, TEXT, torch.zeros(3, 9))])
