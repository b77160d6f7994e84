"""Averages of the params along a training, which generalize better than its last ones: what is trained stays as it is,
and what is evaluated and saved is the average.

    EMA    θ̄ ← decay θ̄ + (1 - decay) θ
    SWA    θ̄ = mean of the θ after `begin` updates

A soup of several trainings is their `combine` instead.
"""

from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.adam import Number
from fgpt.kernels.precision import at_least_fp32
from fgpt.optim import Optimizer
from fgpt.tree import device, node, tree_map

Tree: TypeAlias = Any


@node
class AverageState:
    """The state of `with_ema` and `with_swa`.

    Args:
        inner: The state of the optimizer.
        average: θ̄, of the form of the params, at least in fp32: in half precision it would not move.
        count: The number of updates so far, an integer.

    >>> from fgpt.optim import adamw
    >>> with_ema(adamw(0.1), 0.9).init({"w": torch.ones(2)}).average
    {'w': tensor([1., 1.])}
    """

    inner: Tree
    average: Tree
    count: Int[Tensor, ""]


def with_ema(optimizer: Optimizer, decay: Number) -> Optimizer:
    """The same training, evaluated at the exponential moving average of its params, which begins with those after the
    first update.

    Args:
        optimizer: What trains.
        decay: The weight of the past, from 0 (the last params themselves) to below 1; it may be a scalar tensor.

    Raises:
        InputError: for a decay outside of that range.

    Source: Polyak and Juditsky 1992; as torch.optim.swa_utils.get_ema_multi_avg_fn.

    >>> from fgpt.optim import adamw
    >>> optimizer, params = with_ema(adamw(0.1), 0.5), {"w": torch.ones(2)}
    >>> state, grads = optimizer.init(params), {"w": torch.ones(2)}
    >>> for _ in range(2):
    ...     params, state = optimizer.update(grads, state, params)
    >>> params["w"], optimizer.evaluation_params(state, params)["w"]
    (tensor([0.8000, 0.8000]), tensor([0.8500, 0.8500]))
    """
    if not isinstance(decay, Tensor) and not 0 <= decay < 1:
        raise InputError(f"the decay of an average is {decay}: expected a number from 0 to below 1")

    def weight(count: Tensor) -> Tensor:
        """Of the new params, after `count` updates before."""
        rest = 1 - (decay.double() if isinstance(decay, Tensor) else decay)
        one = torch.ones((), dtype=torch.float64, device=count.device)
        return torch.where(count == 0, one, rest)

    return _with_average(optimizer, weight)


def with_swa(optimizer: Optimizer, begin: int = 0) -> Optimizer:
    """The same training, evaluated at the mean of its params after each update from `begin` on; before it at the last
    ones.

    Args:
        optimizer: What trains, usually at a constant rate by then.
        begin: Updates that are left out.

    Raises:
        InputError: for a negative number.

    Source: Izmailov et al. 2018 (Stochastic Weight Averaging), algorithm 1.

    >>> from fgpt.optim import adamw
    >>> optimizer, params = with_swa(adamw(0.1), begin=1), {"w": torch.ones(2)}
    >>> state, grads = optimizer.init(params), {"w": torch.ones(2)}
    >>> for _ in range(3):
    ...     params, state = optimizer.update(grads, state, params)
    >>> optimizer.evaluation_params(state, params)["w"]  # of 0.8 and 0.7
    tensor([0.7500, 0.7500])
    """
    if begin < 0:
        raise InputError(f"an average begins after {begin} updates: expected 0 or more")
    return _with_average(optimizer, lambda count: 1 / (count - begin + 1).clamp(min=1).double())


def _with_average(optimizer: Optimizer, weight: Any) -> Optimizer:
    def init(params: Tree) -> AverageState:
        count = torch.zeros((), dtype=torch.int64, device=device(params))
        return AverageState(optimizer.init(params), tree_map(lambda x: at_least_fp32(x).clone(), params), count)

    def update(grads: Tree, state: AverageState, params: Tree) -> tuple[Tree, AverageState]:
        params, inner = optimizer.update(grads, state.inner, params)
        share = weight(state.count)

        def move(average: Tensor, x: Tensor) -> Tensor:
            return torch.lerp(average, x.to(average.dtype), share.to(average.dtype))

        average = tree_map(move, state.average, optimizer.evaluation_params(inner, params))
        return params, AverageState(inner, average, state.count + 1)

    def evaluation_params(state: AverageState, params: Tree) -> Tree:
        return tree_map(lambda average, x: average.to(x.dtype), state.average, params)

    return Optimizer(init, update, evaluation_params, optimizer.is_elementwise)
