"""A training step as a pure function."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad_and_value

from fgpt.loss import Batch
from fgpt.optim import Optimizer, clip, global_norm
from fgpt.tree import node, tree_map

Tree: TypeAlias = Any
Loss: TypeAlias = Callable[[Tree, Tree, Batch, torch.Generator | None], tuple[Float[Tensor, ""], Float[Tensor, ""]]]
"""(trainable, frozen, batch, rng) -> (Σ weight · nll, Σ weight)."""


@node
class State:
    """All that a step changes."""

    trainable: Tree
    opt: Tree
    step: Int[Tensor, ""]


@node
class Metrics:
    """What a step reports: mean loss in nats per weighted token, gradient norm before clipping, weighted tokens."""

    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    weight: Float[Tensor, ""]


Step: TypeAlias = Callable[[State, Tree, Sequence[Batch], torch.Generator | None], tuple[State, Metrics]]


def start(trainable: Tree, optimizer: Optimizer) -> State:
    """The state before the first step."""
    return State(trainable, optimizer.init(trainable), torch.zeros((), dtype=torch.int64))


def make_step(loss: Loss, optimizer: Optimizer, max_norm: float | None = 1.0, compile: bool = False) -> Step:
    """`step(state, frozen, batches, rng) -> (state, metrics)`: one update from one or more micro-batches.

    Gradients of the sums are added and divided once by the total weight, so that k ragged micro-batches give the
    gradient of their union. Only `trainable` is differentiated. `compile` compiles the gradient (needs a C++ compiler).
    """

    def total(trainable: Tree, frozen: Tree, batch: Batch, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return loss(trainable, frozen, batch, rng)

    gradient: Any = grad_and_value(total, has_aux=True)
    if compile:
        gradient = torch.compile(gradient, dynamic=False)

    def step(
        state: State, frozen: Tree, batches: Sequence[Batch], rng: torch.Generator | None = None
    ) -> tuple[State, Metrics]:
        grads, (value, weight) = gradient(state.trainable, frozen, batches[0], rng)
        for batch in batches[1:]:
            more, (v, w) = gradient(state.trainable, frozen, batch, rng)
            grads, value, weight = tree_map(torch.add, grads, more), value + v, weight + w
        grads = tree_map(lambda g: g / weight, grads)
        size = global_norm(grads)
        if max_norm is not None:
            grads = clip(grads, size, max_norm)
        trainable, opt = optimizer.update(grads, state.opt, state.trainable)
        return State(trainable, opt, state.step + 1), Metrics(value / weight, size, weight)

    return step
