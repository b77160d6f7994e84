"""Optimizers as (init, update) pairs of pure functions over trees, and schedules as functions of the step."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from fgpt.kernels.adam import AdamNumbers, Number, adam_update
from fgpt.kernels.bitsandbytes_ops import dynamic_code
from fgpt.kernels.blockwise_8bit import dequantize, quantize
from fgpt.kernels.leaf_lists import groups, square_norm
from fgpt.optim_leaves import check_multipliers, decay_mask, leaves_of, lr_patterns
from fgpt.patterns import matching
from fgpt.tree import device, node, static, tree_leaves, tree_map, unflatten_like

Tree: TypeAlias = Any
Schedule: TypeAlias = Callable[[Int[Tensor, ""]], Float[Tensor, ""]]
"""Learning rate at a step, counted from 0."""


class Optimizer(NamedTuple):
    """Pure functions, as in optax. Nothing is changed in place.

    Args:
        init: `state = init(params)`.
        update: `params, state = update(grads, state, params)`: the new params themselves, where optax returns the
            change.
        evaluation_params: `evaluation_params(state, params)`: what is evaluated and saved. By default the params
            themselves; `schedule_free_adamw` takes its gradients at one point and evaluates another.
        is_elementwise: Whether each element is updated by itself, so that rows of a leaf may be updated apart.

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
    evaluation_params: Callable[[Tree, Tree], Tree] = lambda state, params: params
    is_elementwise: bool = True


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

NO_MULTIPLIERS: Mapping[str, Number] = MappingProxyType({})
"""Every leaf has the learning rate itself."""


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
    lr_multipliers: Mapping[str, Number] = NO_MULTIPLIERS,
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
        lr_multipliers: Factors of the learning rate, by regular expressions for whole paths of leaves. The first one
            that matches a leaf counts, and its decay is multiplied, too, as in torch's parameter groups. LoRA+ is
            `{".*/b": 16.0}`: a higher rate for each B.

    Each number may be a scalar tensor, to be mapped over or differentiated.

    Raises:
        InputError: if `decay` is not a regular expression, or a pattern of `lr_multipliers` is none or matches no leaf.

    Source: Loshchilov & Hutter 2019, algorithm 2; Hayou et al. 2024 (LoRA+), section 4, for multipliers.

    >>> optimizer = adamw(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> params, state = optimizer.update({"w": torch.ones(2)}, optimizer.init(params), params)
    >>> params["w"]
    tensor([0.9000, 0.9000])
    """
    return _adam(lr, betas, eps, eps_root, weight_decay, decay, lr_multipliers, encode_moment=lambda x, signed: x)


def adamw8bit(
    lr: Number | Schedule,
    betas: tuple[Number, Number] = (0.9, 0.999),
    *,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decay: str = ".*",
    min_8bit_size: int = 4096,
    eps_root: Number = 0.0,
    lr_multipliers: Mapping[str, Number] = NO_MULTIPLIERS,
) -> Optimizer:
    """AdamW with its moments stored as 8-bit codes: 2.03 bytes for each parameter instead of 8.

    The moments of a leaf with at least `min_8bit_size` elements are decoded, updated in fp32 as in `adamw`, and encoded
    again, some 16 MB of leaves at a time; those of a smaller leaf stay in fp32.

    bitsandbytes' fused update is not used. It writes into its arguments, so that each would have to be copied first; it
    needs the learning rate and the step as Python numbers, and has no vmap; and on CUDA it silently skips gradients
    that are not finite, and decays θ after the step instead of before.

    Moments are rounded, so that no gradient passes from one update to the next. It does pass through one update.

    A CUDA graph cannot capture its update, as bitsandbytes' quantization takes no stream: InputError.

    Args:
        lr: η, a number or a schedule.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ, for leaves of two dimensions or more, never for biases and norms.
        decay: A regular expression; only leaves whose whole path matches it decay.
        min_8bit_size: Elements of the smallest leaf whose moments are encoded.
        eps_root: ε₀, as in `adamw`.
        lr_multipliers: As in `adamw`.

    Raises:
        InputError: as `adamw` does.

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

    optimizer = _adam(lr, betas, eps, eps_root, weight_decay, decay, lr_multipliers, encode_moment)
    return optimizer._replace(is_elementwise=False)


def _adam(
    lr: Number | Schedule,
    betas: tuple[Number, Number],
    eps: Number,
    eps_root: Number,
    weight_decay: Number,
    decay: str,
    lr_multipliers: Mapping[str, Number],
    encode_moment: Callable[[Tensor, bool], Tensor | Moment8],
) -> Optimizer:
    """AdamW, with each moment stored as `encode_moment(moment, signed)` between updates.

    Raises InputError as `adamw` does.
    """
    matching(decay, [])
    check_multipliers(lr_multipliers)
    schedule = lr if callable(lr) else constant_schedule(lr)
    has_decay = isinstance(weight_decay, Tensor) or weight_decay != 0

    def init(params: Tree) -> AdamState:
        check_multipliers(lr_multipliers, params)

        def zeros(signed: bool) -> Tree:
            return tree_map(lambda x: encode_moment(torch.zeros_like(x), signed), params)

        return AdamState(zeros(True), zeros(False), torch.zeros((), dtype=torch.int64, device=device(params)))

    def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        thetas, gs, ms, vs = leaves_of(params, grads, state.mu, state.nu)
        count = state.count.to(thetas[0].device) if thetas else state.count
        t = count + 1
        bias1, bias2 = (1 - beta ** t.double() for beta in betas)  # in fp32 1 - 0.999 is off by 1e-5
        numbers = AdamNumbers(schedule(count), bias1, bias2, *betas, eps, eps_root, weight_decay)
        decays = decay_mask(params, decay) if has_decay else [False] * len(thetas)
        patterns = lr_patterns(params, lr_multipliers)
        new_thetas, new_ms, new_vs = list(thetas), list(ms), list(vs)
        for indices in groups(thetas, [(x.dtype, decays[i], patterns[i]) for i, x in enumerate(thetas)]):
            lists = [[_decode_moment(xs[i]) for i in indices] for xs in (thetas, gs, ms, vs)]
            chosen = numbers if decays[indices[0]] else numbers._replace(weight_decay=0.0)
            if (pattern := patterns[indices[0]]) is not None:
                chosen = chosen._replace(eta=chosen.eta * lr_multipliers[pattern])
            for i, theta, m, v in zip(indices, *adam_update(*lists, numbers=chosen), strict=True):
                new_thetas[i] = theta
                new_ms[i] = encode_moment(_to_dtype_of(ms[i], m), True)
                new_vs[i] = encode_moment(_to_dtype_of(vs[i], v), False)
        mu, nu = unflatten_like(params, new_ms), unflatten_like(params, new_vs)
        return unflatten_like(params, new_thetas), AdamState(mu, nu, t)

    return Optimizer(init, update)


def _to_dtype_of(moment: Tensor | Moment8, x: Tensor) -> Tensor:
    return x.to(moment.dtype) if isinstance(moment, Tensor) and moment.dtype != x.dtype else x


def _decode_moment(moment: Tensor | Moment8) -> Tensor:
    if isinstance(moment, Tensor):
        return moment
    return dequantize(moment.codes, moment.absmax, moment.signed)


def global_norm(tree: Tree) -> Float[Tensor, ""]:
    """The Euclidean norm of all leaves together.

    >>> global_norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return square_norm(tree_leaves(tree)).sqrt()


def clip_factor(norm: Float[Tensor, ""], max_norm: float) -> Float[Tensor, ""]:
    """What scales gradients of the global norm `norm` down to at most `max_norm`; 1 if they are within.

    >>> clip_factor(torch.tensor(4.0), 1.0)
    tensor(0.2500)
    """
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
