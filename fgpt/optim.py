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
from fgpt.tree import leaves, node, static, tree_leaves, tree_map, tree_map_multi, unflatten_like

Tree: TypeAlias = Any
Schedule: TypeAlias = Callable[[Int[Tensor, ""]], Float[Tensor, ""]]
"""Learning rate at a step, counted from 0."""
Number: TypeAlias = int | float | Tensor
"""A number, or a scalar tensor, which a sweep maps over and a metagradient differentiates."""


class Optimizer(NamedTuple):
    """A pair of pure functions, as in optax. Nothing is changed in place.

    Args:
        init: `state = init(params)`.
        update: `params, state = update(grads, state, params)`: the new params themselves, where optax returns the
            change.

    >>> def update(grads, state, params):
    ...     return {"w": params["w"] - 0.1 * grads["w"]}, state
    >>> sgd = Optimizer(init=lambda params: (), update=update)
    >>> params = {"w": torch.ones(2)}
    >>> params, state = sgd.update({"w": torch.ones(2)}, sgd.init(params), params)
    >>> params["w"]
    tensor([0.9000, 0.9000])
    """

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


# --------------------------------------------------------------------------------------------------------- schedules


def constant_schedule(lr: Number, warmup_steps: Number = 0) -> Schedule:
    """lr, after a linear warmup.

    Args:
        lr: The learning rate.
        warmup_steps: Steps of the warmup.

    >>> schedule = constant_schedule(1e-3, warmup_steps=10)
    >>> round(float(schedule(torch.tensor(4))), 6)
    0.0005
    """
    return lambda step: lr * _warmup(step, warmup_steps)


def linear_schedule(lr: Number, total_steps: Number, *, warmup_steps: Number = 0, final_lr: Number = 0.0) -> Schedule:
    """A linear warmup, then a linear decay.

    Args:
        lr: The peak learning rate, at the end of the warmup.
        total_steps: Steps of the training, warmup included.
        warmup_steps: Steps of the warmup.
        final_lr: The learning rate at the last step.

    >>> schedule = linear_schedule(1.0, total_steps=10)
    >>> schedule(torch.tensor(5))
    tensor(0.5000, dtype=torch.float64)
    """

    def schedule(step: Tensor) -> Tensor:
        decay = (final_lr - lr) * _progress(step, total_steps, warmup_steps)
        return _warmup(step, warmup_steps) * (lr + decay)

    return schedule


def cosine_schedule(lr: Number, total_steps: Number, *, warmup_steps: Number = 0, final_lr: Number = 0.0) -> Schedule:
    """A linear warmup, then a cosine decay.

    Args:
        lr: The peak learning rate, at the end of the warmup.
        total_steps: Steps of the training, warmup included.
        warmup_steps: Steps of the warmup.
        final_lr: The learning rate at the last step.

    Source: Loshchilov & Hutter 2017 (SGDR), section 3.

    >>> schedule = cosine_schedule(1.0, total_steps=10, final_lr=0.1)
    >>> [round(float(schedule(torch.tensor(step))), 3) for step in (0, 5, 10)]
    [1.0, 0.55, 0.1]
    """

    def schedule(step: Tensor) -> Tensor:
        angle = math.pi * _progress(step, total_steps, warmup_steps)
        return _warmup(step, warmup_steps) * (final_lr + (lr - final_lr) * (1 + torch.cos(angle)) / 2)

    return schedule


def _warmup(step: Tensor, warmup_steps: Number) -> Tensor:
    return ((step.double() + 1) / _at_least_1(warmup_steps)).clamp(max=1.0)


def _progress(step: Tensor, total_steps: Number, warmup_steps: Number) -> Tensor:
    """0 at the end of the warmup, 1 at the last step."""
    return ((step.double() - warmup_steps) / _at_least_1(total_steps - warmup_steps)).clamp(0.0, 1.0)


def _at_least_1(x: Number) -> Number:
    return x.clamp(min=1) if isinstance(x, Tensor) else max(x, 1)


# -------------------------------------------------------------------------------------------------------- optimizers


@node
class Moment8:
    """A moment as 8-bit dynamic codes: 1 byte an element, and 4 for the largest magnitude of each block of 256."""

    codes: UInt8[Tensor, "*shape"]
    absmax: Float32[Tensor, " blocks"]
    signed: bool = static()


@node
class AdamState:
    """The state of `adamw` and `adamw8bit`.

    Args:
        mu: The first moment of each leaf of the params: a tensor of its shape, or its 8-bit codes.
        nu: The second moment, likewise.
        count: The number of updates so far, an integer.

    >>> adamw(0.1).init({"w": torch.ones(2)}).nu
    {'w': tensor([0., 0.])}
    """

    mu: Tree
    nu: Tree
    count: Int[Tensor, ""]


def adamw(
    lr: Number | Schedule,
    betas: tuple[Number, Number] = (0.9, 0.999),
    *,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decay: str = ".*",
    eps_root: Number = 0.0,
) -> Optimizer:
    """AdamW: m ← β₁m + (1-β₁)g; v ← β₂v + (1-β₂)g²; θ ← θ - η (m̂ / (√(v̂ + ε₀) + ε) + λθ).

    Args:
        lr: η, a number or a schedule.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ, for leaves of two dimensions or more, never for biases and norms.
        decay: A regular expression; only leaves whose whole path matches it decay.
        eps_root: ε₀, which is 0 in the paper. Above 0, as in optax, the step has a derivative at v = 0, that is at
            every leaf that has had no gradient yet.

    Each number may be a scalar tensor, to be mapped over or differentiated.

    Raises:
        InputError: if `decay` is not a regular expression.

    Source: Loshchilov & Hutter 2019, algorithm 2.

    >>> optimizer = adamw(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> params, state = optimizer.update({"w": torch.ones(2)}, optimizer.init(params), params)
    >>> params["w"]
    tensor([0.9000, 0.9000])
    """
    return _adam(lr, betas, eps, eps_root, weight_decay, decay, encode_moment=lambda x, signed: x)


def adamw8bit(
    lr: Number | Schedule,
    betas: tuple[Number, Number] = (0.9, 0.999),
    *,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decay: str = ".*",
    min_8bit_size: int = 4096,
    eps_root: Number = 0.0,
) -> Optimizer:
    """AdamW with its moments stored as 8-bit codes: 2.03 bytes for each parameter instead of 8.

    The moments of a leaf with at least `min_8bit_size` elements are decoded, updated in fp32 as in `adamw`, and encoded
    again, one leaf at a time; those of a smaller leaf stay in fp32.

    bitsandbytes' fused update is not used. It writes into its arguments, so that each would have to be copied first; it
    needs the learning rate and the step as Python numbers, and has no vmap; and on CUDA it silently skips gradients
    that are not finite, and decays θ after the step instead of before.

    Moments are rounded, so that no gradient passes from one update to the next. It does pass through one update.

    Args:
        lr: η, a number or a schedule.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ, for leaves of two dimensions or more, never for biases and norms.
        decay: A regular expression; only leaves whose whole path matches it decay.
        min_8bit_size: Elements of the smallest leaf whose moments are encoded.
        eps_root: ε₀, as in `adamw`.

    Raises:
        InputError: if `decay` is not a regular expression.

    Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.

    >>> optimizer = adamw8bit(0.1)
    >>> params = {"w": torch.ones(64, 64)}
    >>> optimizer.init(params).mu["w"].codes.dtype
    torch.uint8
    """
    for signed in (True, False):
        dynamic_code(signed)  # cached from here on, outside of any transform

    def encode_moment(x: Tensor, signed: bool) -> Tensor | Moment8:
        return Moment8(*quantize(x, signed), signed) if x.numel() >= min_8bit_size else x

    return _adam(lr, betas, eps, eps_root, weight_decay, decay, encode_moment)


def _adam(
    lr: Number | Schedule,
    betas: tuple[Number, Number],
    eps: Number,
    eps_root: Number,
    weight_decay: Number,
    decay: str,
    encode_moment: Callable[[Tensor, bool], Tensor | Moment8],
) -> Optimizer:
    """AdamW, with each moment stored as `encode_moment(moment, signed)` between updates.

    Raises InputError as `matching` does, if `decay` is not a regular expression.
    """
    matching(decay, [])
    schedule = lr if callable(lr) else constant_schedule(lr)
    has_decay = isinstance(weight_decay, Tensor) or weight_decay != 0
    has_eps_root = isinstance(eps_root, Tensor) or eps_root != 0

    def init(params: Tree) -> AdamState:
        def zeros(signed: bool) -> Tree:
            return tree_map(lambda x: encode_moment(torch.zeros_like(x), signed), params)

        return AdamState(zeros(True), zeros(False), torch.zeros((), dtype=torch.int64))

    def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        eta, t = schedule(state.count), state.count + 1
        bias1, bias2 = (1 - beta ** t.double() for beta in betas)  # in fp32 1 - 0.999 is off by 1e-5

        def update_leaf(
            theta: Tensor, g: Tensor, m: Tensor | Moment8, v: Tensor | Moment8, decays: bool
        ) -> tuple[Any, Any, Any]:
            m, v = _decode_moment(m), _decode_moment(v)
            g = g.to(m.dtype)
            m, v = _first_moment(m, g, betas[0]), _second_moment(v, g, betas[1])
            square = v / bias2 + eps_root if has_eps_root else v / bias2
            step = (m / bias1) / (square.sqrt() + eps)
            step = step + weight_decay * theta if decays else step
            return (theta - eta * step).to(theta.dtype), encode_moment(m, True), encode_moment(v, False)

        decay_mask = _decay_mask(params, decay if has_decay else None)
        params, mu, nu = tree_map_multi(update_leaf, 3, params, grads, state.mu, state.nu, decay_mask)
        return params, AdamState(mu, nu, t)

    return Optimizer(init, update)


def _decay_mask(params: Tree, pattern: str | None) -> Tree:
    """A tree of bools: whether a leaf has two dimensions or more and its whole path matches `pattern`."""
    if pattern is None:
        return tree_map(lambda x: False, params)
    by_path = leaves(params)
    decayed = set(matching(pattern, [path for path, x in by_path.items() if x.ndim > 1]))
    return unflatten_like(params, [path in decayed for path in by_path])


def _first_moment(m: Tensor, g: Tensor, beta: Number) -> Tensor:
    return torch.lerp(m, g, (1 - beta).to(m.dtype) if isinstance(beta, Tensor) else 1 - beta)


def _second_moment(v: Tensor, g: Tensor, beta: Number) -> Tensor:
    if isinstance(beta, Tensor):
        return (v * beta + (1 - beta) * g * g).to(v.dtype)
    return torch.addcmul(v * beta, g, g, value=1 - beta)


def _decode_moment(moment: Tensor | Moment8) -> Tensor:
    if isinstance(moment, Tensor):
        return moment
    return dequantize(moment.codes, moment.absmax, moment.signed)


def global_norm(tree: Tree) -> Float[Tensor, ""]:
    """The Euclidean norm of all leaves together.

    >>> global_norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return torch.stack([at_least_fp32(x).square().sum() for x in tree_leaves(tree)]).sum().sqrt()


def clip_by_global_norm(grads: Tree, norm: Float[Tensor, ""], max_norm: float) -> Tree:
    """`grads`, whose global norm is `norm`, scaled down to a global norm of at most `max_norm`."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return tree_map(lambda g: g * scale, grads)
