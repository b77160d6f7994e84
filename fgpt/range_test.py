"""A learning-rate range test: one training for each of several rates, all of them as one mapped step."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.rng import fold_in
from fgpt.train_step import Key, State, Step
from fgpt.tree import device, tree_map


class LRRange(NamedTuple):
    """What a range test found.

    Args:
        lrs: The rates.
        losses: The loss of each before each of its updates, in nats per weighted token.
        smoothed: Their exponential moving averages, with its bias corrected.
        suggestion: The rate that `suggest_lr` takes; None if no rate lowers the loss.

    >>> import torch
    >>> LRRange(torch.tensor([1e-3]), torch.zeros(1, 4), torch.zeros(1, 4), None).losses.shape
    torch.Size([1, 4])
    """

    lrs: Float[Tensor, " rates"]
    losses: Float[Tensor, "rates steps"]
    smoothed: Float[Tensor, "rates steps"]
    suggestion: float | None


def lr_range(
    step_for: Callable[[Float[Tensor, ""]], Step],
    state: State,
    frozen: Any,
    batches: Iterable[Sequence[Batch]],
    *,
    lrs: Float[Tensor, " rates"],
    rng: Key | None = None,
    smoothing: float = 0.9,
) -> LRRange:
    """Train from one state with each rate, on the same batches and with the same dropout, and compare the losses. Those
    of a rate are those of a training of its own.

    The members are mapped over: the frozen base is in memory once and multiplied with all members' rows at once.

    Args:
        step_for: The step of a rate, such as `lambda lr: make_step(loss, adamw(lr))`.
        state: The state before the first step; one for all rates.
        frozen: What the step keeps frozen, such as the base.
        batches: The micro-batches of each step; as many steps are taken.
        lrs: The rates, in rising order.
        rng: A key or its seed, folded with the number of each step.
        smoothing: The share of the past in the moving average.

    Raises:
        InputError: for fewer than two rates or steps, or rates that do not rise.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> text = torch.tensor([[1, 2, 3, 4]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3))
    >>> def step_for(lr):
    ...     return fgpt.make_step(lambda a, p, batch, seed: fgpt.nll(fgpt.adapt(p, a), batch), fgpt.adamw(lr))
    >>> state = fgpt.init_state(fgpt.lora(params, fgpt.key(1), rank=2), fgpt.adamw(0.0))
    >>> result = lr_range(step_for, state, params, [[batch]] * 8, lrs=torch.logspace(-4, -1, 4))
    >>> result.losses.shape, round(result.suggestion, 4)
    (torch.Size([4, 8]), 0.1)
    """
    if lrs.ndim != 1 or len(lrs) < 2 or not bool((lrs.diff() > 0).all()) or not float(lrs[0]) > 0:
        raise InputError(f"the rates of a range test are {lrs.tolist()}: expected two or more above 0, in rising order")
    states = tree_map(lambda x: x.expand(len(lrs), *x.shape), state)
    rates = lrs.to(device(state.trainable))
    columns: list[Tensor] = []
    for i, micro_batches in enumerate(batches):
        key = None if rng is None else fold_in(rng, i)

        def member(lr: Tensor, one: State, micro_batches: Any = micro_batches, key: Any = key) -> Any:
            return step_for(lr)(one, frozen, micro_batches, key)

        states, metrics = vmap(member)(rates, states)
        columns.append(metrics.loss.detach().cpu().double())
    if len(columns) < 2:
        raise InputError(f"a range test has {len(columns)} steps: expected two or more")
    losses = torch.stack(columns, 1)
    smoothed = moving_average(losses, smoothing)
    return LRRange(lrs, losses, smoothed, suggest_lr(lrs, losses, smoothed))


def moving_average(losses: Float[Tensor, "rates steps"], smoothing: float) -> Float[Tensor, "rates steps"]:
    """The exponential moving average over steps, divided by the weight that it has so far.

    >>> moving_average(torch.tensor([[1.0, 3.0]]), 0.5)
    tensor([[1.0000, 2.3333]])
    """
    total, weight, columns = torch.zeros_like(losses[:, 0]), 0.0, []
    for column in losses.unbind(1):
        total, weight = smoothing * total + (1 - smoothing) * column, smoothing * weight + (1 - smoothing)
        columns.append(total / weight)
    return torch.stack(columns, 1)


def has_diverged(losses: Float[Tensor, "rates steps"], smoothed: Float[Tensor, "rates steps"]) -> list[bool]:
    """For each rate whether one of its losses is not finite, or its smoothed loss ends more than 1 % above that of the
    lowest rate, which hardly moves and meets the same batches.

    >>> has_diverged(torch.tensor([[3.0, 2.9], [3.0, torch.nan]]), torch.tensor([[3.0, 2.9], [3.0, 2.0]]))
    [False, True]
    """
    is_finite = losses.isfinite().all(1).tolist()
    ends = smoothed[:, -1].tolist()
    return [not finite or end > 1.01 * ends[0] for finite, end in zip(is_finite, ends, strict=True)]


def suggest_lr(
    lrs: Float[Tensor, " rates"], losses: Float[Tensor, "rates steps"], smoothed: Float[Tensor, "rates steps"]
) -> float | None:
    """The rate of the lowest smoothed loss at the end, that is of the steepest descent, of those below the first that
    diverges, and at most a third of that one. None if the lowest rate is the best.

    >>> lrs, losses = torch.tensor([0.1, 1.0, 10.0]), torch.tensor([[3.0, 2.9], [3.0, 2.0], [3.0, 9.0]])
    >>> suggest_lr(lrs, losses, losses)
    1.0
    """
    diverged = [i for i, broken in enumerate(has_diverged(losses, smoothed)) if broken]
    end = diverged[0] if diverged else len(lrs)
    if end < 2:
        return None
    best = int(smoothed[:end, -1].argmin())
    if best == 0:
        return None
    limit = float(lrs[end]) / 3 if diverged else math.inf
    return min(float(lrs[best]), limit)
