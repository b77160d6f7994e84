"""Optimizers as (init, update) pairs of pure functions over trees, and schedules as functions of the step."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from fgpt.kernels.bitsandbytes_ops import dynamic_code
from fgpt.kernels.blockwise_8bit import dequantize, quantize
from fgpt.kernels.precision import at_least_fp32
from fgpt.patterns import matching
from fgpt.tree import leaves, node, static, tree_leaves, tree_map, tree_map_multi

Tree: TypeAlias = Any
Schedule: TypeAlias = Callable[[Int[Tensor, ""]], Float[Tensor, ""]]
"""Learning rate at a step, counted from 0."""
Number: TypeAlias = int | float | Tensor
"""A number, or a tensor without axes that holds it: what a sweep maps over, and a metagradient differentiates by."""


class Optimizer(NamedTuple):
    """`state = init(params)`; `params, state = update(grads, state, params)`. Nothing is changed in place."""

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


# --------------------------------------------------------------------------------------------------------- schedules


def constant_schedule(lr: Number, warmup: Number = 0) -> Schedule:
    """lr, after a linear rise over the first `warmup` steps."""
    return lambda step: lr * _rise(step, warmup)


def linear_schedule(lr: Number, steps: Number, warmup: Number = 0, end: Number = 0.0) -> Schedule:
    """A linear rise, then a straight line from lr to `end` at the last of `steps`."""
    return lambda step: _rise(step, warmup) * (lr + (end - lr) * _progress(step, steps, warmup))


def cosine_schedule(lr: Number, steps: Number, warmup: Number = 0, end: Number = 0.0) -> Schedule:
    """A linear rise, then half a cosine from lr to `end` at the last of `steps`.

    Source: Loshchilov & Hutter 2017 (SGDR), section 3.
    """
    return lambda step: (
        _rise(step, warmup) * (end + (lr - end) * (1 + torch.cos(math.pi * _progress(step, steps, warmup))) / 2)
    )


def _rise(step: Tensor, warmup: Number) -> Tensor:
    return ((step.double() + 1) / _at_least_1(warmup)).clamp(max=1.0)


def _progress(step: Tensor, steps: Number, warmup: Number) -> Tensor:
    return ((step.double() - warmup) / _at_least_1(steps - warmup)).clamp(0.0, 1.0)


def _at_least_1(x: Number) -> Number:
    return x.clamp(min=1) if isinstance(x, Tensor) else max(x, 1)


# -------------------------------------------------------------------------------------------------------- optimizers


@node
class Moment8:
    """A moment as 8-bit dynamic codes: 1 byte a number, and 4 for the largest magnitude in each block of 256."""

    codes: UInt8[Tensor, "*shape"]
    absmax: Float32[Tensor, " blocks"]
    signed: bool = static()


@node
class AdamState:
    """Moments, shaped like the params, and the number of updates done."""

    mu: Tree
    nu: Tree
    count: Int[Tensor, ""]


def adamw(
    lr: Number | Schedule,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decay: str = ".*",
    *,
    eps_root: Number = 0.0,
) -> Optimizer:
    """AdamW: m ← β₁m + (1-β₁)g; v ← β₂v + (1-β₂)g²; θ ← θ - η (m̂ / (√(v̂ + ε₀) + ε) + λθ).

    Its numbers may be tensors without axes, to be mapped over or differentiated by. ε₀ = `eps_root` is 0 in the paper;
    above 0, as in optax, the step has a derivative where v is 0: at every leaf that has had no gradient yet.

    The decay λ = `weight_decay` acts on leaves of two dimensions or more whose path matches `decay` in full: never on
    biases and norms.

    Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    return _adam(lr, betas, eps, eps_root, weight_decay, decay, encode_moment=lambda x, signed: x)


def adamw8bit(
    lr: Number | Schedule,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decay: str = ".*",
    min_8bit_size: int = 4096,
    *,
    eps_root: Number = 0.0,
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
        return Moment8(*quantize(x, signed), signed) if x.numel() >= min_8bit_size else x

    return _adam(lr, betas, eps, eps_root, weight_decay, decay, hold)


def _adam(
    lr: Number | Schedule,
    betas: tuple[Number, Number],
    eps: Number,
    eps_root: Number,
    weight_decay: Number,
    decay: str,
    encode_moment: Callable[[Tensor, bool], Tensor | Moment8],
) -> Optimizer:
    """AdamW, with each moment kept as `hold(moment, signed)` from one update to the next.

    Raises InputError as `matching` does, where `decay` is no regular expression.
    """
    matching(decay, [])
    rate = lr if callable(lr) else constant_schedule(lr)
    decaying = isinstance(weight_decay, Tensor) or weight_decay != 0
    rooted = isinstance(eps_root, Tensor) or eps_root != 0

    def init(params: Tree) -> AdamState:
        def zeros(signed: bool) -> Tree:
            return tree_map(lambda x: encode_moment(torch.zeros_like(x), signed), params)

        return AdamState(zeros(True), zeros(False), torch.zeros((), dtype=torch.int64))

    def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        eta, t = rate(state.count), state.count + 1
        bias1, bias2 = (1 - beta ** t.double() for beta in betas)  # in fp32 1 - 0.999 is off by 1e-5
        decayed = set(matching(decay, [p for p, x in leaves(params).items() if x.ndim > 1])) if decaying else set()
        decays = iter([path in decayed for path in leaves(params)] if decaying else ())

        def moved(theta: Tensor, g: Tensor, m: Tensor | Moment8, v: Tensor | Moment8) -> tuple[Any, Any, Any]:
            m, v = _decode_moment(m), _decode_moment(v)
            g = g.to(m.dtype)
            m, v = _first(m, g, betas[0]), _second(v, g, betas[1])
            square = v / bias2 + eps_root if rooted else v / bias2
            step = (m / bias1) / (square.sqrt() + eps)
            step = step + weight_decay * theta if next(decays, False) else step
            return (theta - eta * step).to(theta.dtype), encode_moment(m, True), encode_moment(v, False)

        params, mean, square = tree_map_multi(moved, 3, params, grads, state.mu, state.nu)
        return params, AdamState(mean, square, t)

    return Optimizer(init, update)


def _first(m: Tensor, g: Tensor, beta: Number) -> Tensor:
    return torch.lerp(m, g, (1 - beta).to(m.dtype) if isinstance(beta, Tensor) else 1 - beta)


def _second(v: Tensor, g: Tensor, beta: Number) -> Tensor:
    if isinstance(beta, Tensor):
        return (v * beta + (1 - beta) * g * g).to(v.dtype)
    return torch.addcmul(v * beta, g, g, value=1 - beta)


def _decode_moment(moment: Tensor | Moment8) -> Tensor:
    if isinstance(moment, Tensor):
        return moment
    return dequantize(moment.codes, moment.absmax, moment.signed)


def global_norm(tree: Tree) -> Float[Tensor, ""]:
    """The Euclidean norm of all leaves together."""
    return torch.stack([at_least_fp32(x).square().sum() for x in tree_leaves(tree)]).sum().sqrt()


def clip_by_global_norm(grads: Tree, norm: Float[Tensor, ""], most: float) -> Tree:
    """`grads` scaled down so that their global norm is at most `most`; unchanged where it is already."""
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    return tree_map(lambda g: g * scale, grads)
