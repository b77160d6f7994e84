"""Averages along a training: those of torch.optim.swa_utils, and nothing of the training changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import close, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fgpt
from fgpt.optim_averages import with_ema, with_swa

OPTIMIZERS: list[Callable[..., fgpt.Optimizer]] = [fgpt.adamw, fgpt.muon, fgpt.schedule_free_adamw]


def gradients(steps: int) -> list[dict[str, Tensor]]:
    rng = fgpt.key(0)
    return [{"w": torch.randn(4, 3, generator=rng), "b": torch.randn(3, generator=rng)} for _ in range(steps)]


GRADIENTS = gradients(8)


def train(optimizer: fgpt.Optimizer, steps: int) -> tuple[list[Any], Any]:
    """The params after each update, and what is evaluated at the end."""
    params: Any = {"w": torch.ones(4, 3), "b": torch.zeros(3)}
    state, course = optimizer.init(params), []
    for grads in GRADIENTS[:steps]:
        params, state = optimizer.update(grads, state, params)
        course.append(params)
    return course, optimizer.evaluation_params(state, params)


@settings(max_examples=20)
@given(st.integers(1, 8), st.sampled_from([0.0, 0.3, 0.9, 0.999]))
def test_the_moving_average_is_torchs(steps: int, decay: float):
    course, average = train(with_ema(fgpt.adamw(0.1), decay), steps)
    module = torch.nn.ParameterDict({name: torch.nn.Parameter(x.clone()) for name, x in course[0].items()})
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for params in course:
        for name, x in params.items():
            module[name].data.copy_(x)
        averaged.update_parameters(module)
    for name, x in average.items():
        close(x, averaged.module[name].detach(), 1e-6)


@settings(max_examples=20)
@given(st.integers(1, 8), st.integers(0, 9))
def test_swa_is_the_mean_of_the_rest(steps: int, begin: int):
    course, average = train(with_swa(fgpt.adamw(0.1), begin), steps)
    rest = course[begin:] or course[-1:]
    for name, x in average.items():
        close(x, torch.stack([params[name] for params in rest]).mean(0), 1e-6)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_training_itself_does_not_change(make: Callable[..., fgpt.Optimizer]):
    plain, evaluated = train(make(0.1), 5)
    for wrapped in (with_ema(make(0.1), 0.0), with_ema(make(0.1), 0.9), with_swa(make(0.1), 2)):
        course, _ = train(wrapped, 5)
        assert same(course, plain)
    close(train(with_ema(make(0.1), 0.0), 5)[1], evaluated, 1e-6)  # decay 0 is what the optimizer evaluates by itself


@pytest.mark.parametrize(
    ("wrap", "values", "expected"),
    [
        (with_swa, [1 + i / 999 for i in range(1000)], 1.5),
        (lambda optimizer: with_ema(optimizer, 0.999), [1.0, *[2.0] * 999], 2 - 0.999**999),
    ],
)
def test_averages_of_half_precision_move(wrap: Any, values: list[float], expected: float):
    """They are kept in fp32, and evaluated in the dtype of the params."""
    optimizer = wrap(fgpt.Optimizer(lambda params: (), lambda grads, state, params: (grads, state)))
    params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    state = optimizer.init(params)
    for value in values:
        params, state = optimizer.update({"w": torch.full_like(params["w"], value)}, state, params)
    average = optimizer.evaluation_params(state, params)["w"]
    assert average.dtype == torch.bfloat16
    assert abs(float(average[0]) - expected) < 0.02


def test_decays_can_be_mapped_over():
    decays = torch.tensor([0.0, 0.5, 0.9])
    got = vmap(lambda decay: train(with_ema(fgpt.adamw(0.1), decay), 4)[1])(decays)
    for i, decay in enumerate(decays.tolist()):
        close({name: x[i] for name, x in got.items()}, train(with_ema(fgpt.adamw(0.1), decay), 4)[1], 1e-6)


@pytest.mark.parametrize("make", [lambda: with_ema(fgpt.adamw(0.1), 1.0), lambda: with_swa(fgpt.adamw(0.1), -1)])
def test_what_is_no_average_is_refused(make: Callable[[], Any]):
    with pytest.raises(fgpt.InputError, match="expected"):
        make()
