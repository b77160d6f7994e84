"""Optimisers as (init, update) pairs of pure functions over trees, and schedules as functions of the step."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from fgpt.kernels.bnb import dynamic_code
from fgpt.kernels.dynamic8 import dequantize, quantize
from fgpt.tree import leaves, matches, node, static, tree_leaves, tree_map, tree_maps

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
class Moment8:
    """A moment as 8-bit dynamic codes: 1 byte a number, and 4 for the largest magnitude in each block of 256."""

    codes: UInt8[Tensor, "*shape"]
    absmax: Float32[Tensor, " blocks"]
    signed: bool = static()


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
    return _adam(lr, betas, eps, weight_decay, decay, hold=lambda x, signed: x)


def adamw8bit(
    lr: float | Schedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = ".*",
    smallest: int = 4096,
) -> Optimizer:
    """AdamW whose moments rest as 8-bit codes: 2.03 bytes a parameter in place of 8.

    A leaf with at least `smallest` numbers has its moments decoded, moved in fp32 as in `adamw`, and coded again, one
    leaf at a time; a smaller leaf keeps them in fp32.

    bitsandbytes' fused update is not used: it writes into its arguments, so that each would be copied first; it wants
    the learning rate and the step as Python numbers, and no vmap; and on CUDA it passes silently over gradients that
    are not finite, and decays θ after the step instead of before.

    Moments round, so that no gradient passes from one update to the next; through one it does.

    Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.
    """
    for signed in (True, False):
        dynamic_code(signed)  # kept from here on, where no transform surrounds it

    def hold(x: Tensor, signed: bool) -> Tensor | Moment8:
        return Moment8(*quantize(x, signed), signed) if x.numel() >= smallest else x

    return _adam(lr, betas, eps, weight_decay, decay, hold)


def _adam(
    lr: float | Schedule,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay: str,
    hold: Callable[[Tensor, bool], Tensor | Moment8],
) -> Optimizer:
    """AdamW, with each moment kept as `hold(moment, signed)` from one update to the next.

    Raises InputError where `decay` is no regular expression.
    """
    matches(decay, "")
    rate = constant(lr) if isinstance(lr, int | float) else lr

    def init(params: Tree) -> AdamState:
        def zeros(signed: bool) -> Tree:
            return tree_map(lambda x: hold(torch.zeros_like(x), signed), params)

        return AdamState(zeros(True), zeros(False), torch.zeros((), dtype=torch.int64))

    def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        eta, t = rate(state.count), state.count + 1
        bias1, bias2 = (1 - beta ** t.double() for beta in betas)  # in fp32 1 - 0.999 is off by 1e-5
        decays = iter(
            [x.ndim > 1 and matches(decay, path) for path, x in leaves(params).items()] if weight_decay else ()
        )

        def moved(theta: Tensor, g: Tensor, m: Tensor | Moment8, v: Tensor | Moment8) -> tuple[Any, Any, Any]:
            m, v = _read(m), _read(v)
            g = g.to(m.dtype)
            m = torch.lerp(m, g, 1 - betas[0])
            v = torch.addcmul(v * betas[1], g, g, value=1 - betas[1])
            step = (m / bias1) / ((v / bias2).sqrt() + eps)
            step = step + weight_decay * theta if next(decays, False) else step
            return (theta - eta * step).to(theta.dtype), hold(m, True), hold(v, False)

        params, mean, square = tree_maps(moved, 3, params, grads, state.mean, state.square)
        return params, AdamState(mean, square, t)

    return Optimizer(init, update)


def _read(moment: Tensor | Moment8) -> Tensor:
    if isinstance(moment, Tensor):
        return moment
    return dequantize(moment.codes, moment.absmax, moment.signed)


def global_norm(tree: Tree) -> Float[Tensor, ""]:
    """The Euclidean norm of all leaves together."""
    return torch.stack([x.float().square().sum() for x in tree_leaves(tree)]).sum().sqrt()


def clip(grads: Tree, norm: Float[Tensor, ""], most: float) -> Tree:
    """`grads` scaled down so that their global norm is at most `most`; unchanged where it is already."""
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    return tree_map(lambda g: g * scale, grads)
