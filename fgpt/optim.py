"""Optimisers as (init, update) pairs of pure functions over trees, and schedules as functions of the step."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.tree import leaves, matches, node, tree_map

Tree: TypeAlias = Any
Schedule: TypeAlias = Callable[[Int[Tensor, ""]], Float[Tensor, ""]]
"""Learning rate at a step, counted from 0."""


class Optimizer(NamedTuple):
    """`state = init(params)`; `params, state = update(grads, state, params)`. Nothing is changed in place."""

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


# --------------------------------------------------------------------------------------------------------- schedules


def constant(lr: float, warmup: int = 0) -> Schedule:
    """lr, after a linear rise over the first `warmup` steps."""
    return lambda step: lr * _rise(step, warmup)


def linear(lr: float, steps: int, warmup: int = 0, end: float = 0.0) -> Schedule:
    """A linear rise, then a straight line from lr to `end` at the last of `steps`."""
    return lambda step: _rise(step, warmup) * (lr + (end - lr) * _progress(step, steps, warmup))


def cosine(lr: float, steps: int, warmup: int = 0, end: float = 0.0) -> Schedule:
    """A linear rise, then half a cosine from lr to `end` at the last of `steps`.

    Source: Loshchilov & Hutter 2017 (SGDR), section 3.
    """
    return lambda step: (
        _rise(step, warmup) * (end + (lr - end) * (1 + torch.cos(math.pi * _progress(step, steps, warmup))) / 2)
    )


def _rise(step: Tensor, warmup: int) -> Tensor:
    return ((step.double() + 1) / max(warmup, 1)).clamp(max=1.0)


def _progress(step: Tensor, steps: int, warmup: int) -> Tensor:
    return ((step.double() - warmup) / max(steps - warmup, 1)).clamp(0.0, 1.0)


# -------------------------------------------------------------------------------------------------------- optimisers


@node
class AdamState:
    """Moments, shaped like the params, and the number of updates done."""

    mean: Tree
    square: Tree
    count: Int[Tensor, ""]


def adamw(
    lr: float | Schedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = ".*",
) -> Optimizer:
    """AdamW: m ← β₁m + (1-β₁)g; v ← β₂v + (1-β₂)g²; θ ← θ - η (m̂ / (√v̂ + ε) + λθ).

    The decay λ = `weight_decay` acts on leaves of two dimensions or more whose path matches `decay` in full: never on
    biases and norms.

    Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    rate = constant(lr) if isinstance(lr, int | float) else lr

    def init(params: Tree) -> AdamState:
        zeros = tree_map(torch.zeros_like, params)
        return AdamState(zeros, zeros, torch.zeros((), dtype=torch.int64))

    def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        eta, t = rate(state.count), state.count + 1
        bias1, bias2 = (1 - beta ** t.double() for beta in betas)  # in fp32 1 - 0.999 is off by 1e-5
        mean = tree_map(lambda m, g: torch.lerp(m, g, 1 - betas[0]), state.mean, grads)
        square = tree_map(lambda v, g: torch.addcmul(v * betas[1], g, g, value=1 - betas[1]), state.square, grads)

        def moved(theta: Tensor, m: Tensor, v: Tensor, decays: bool) -> Tensor:
            step = (m / bias1) / ((v / bias2).sqrt() + eps)
            return theta - eta * (step + weight_decay * theta if decays and weight_decay else step)

        decays = iter([x.ndim > 1 and matches(decay, path) for path, x in leaves(params).items()])
        new = tree_map(lambda theta, m, v: moved(theta, m, v, next(decays)), params, mean, square)
        return new, AdamState(mean, square, t)

    return Optimizer(init, update)


def global_norm(tree: Tree) -> Float[Tensor, ""]:
    """The Euclidean norm of all leaves together."""
    return torch.stack([x.float().square().sum() for x in leaves(tree).values()]).sum().sqrt()


def clip(grads: Tree, norm: Float[Tensor, ""], most: float) -> Tree:
    """`grads` scaled down so that their global norm is at most `most`; unchanged where it is already."""
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    return tree_map(lambda g: g * scale, grads)
