"""One update of AdamW over a list of leaves, of one dtype and with or without decay:

    m ← β₁m + (1-β₁)g        v ← β₂v + (1-β₂)g²        θ ← θ - η (m / bias₁ / (√(v / bias₂ + ε₀) + ε) + λθ)

    reference     leaf by leaf, out of place
    fast path     torch._foreach_*: one kernel for many leaves, and on a CPU to the bit the reference of leaves in one
                  memory order. It writes into temporaries of its own, never into an argument
    transforms    under vmap, derivatives and compilation the reference runs, which is plain torch; and so it does for
                  numbers that are tensors

All of it is computed at least in fp32, and η and the bias corrections never in less.

Source: Loshchilov & Hutter 2019 (AdamW), algorithm 2.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.functorch_state import is_undisturbed
from fgpt.kernels.leaf_lists import foreach
from fgpt.kernels.precision import wide

Number: TypeAlias = int | float | Tensor
"""A number, or a scalar tensor, which a sweep maps over and a metagradient differentiates."""
Leaves: TypeAlias = Sequence[Tensor]


class AdamNumbers(NamedTuple):
    """The numbers of one update. λ is for the leaves that decay."""

    eta: Number
    bias1: Float[Tensor, ""]
    """1 - β₁ᵗ"""
    bias2: Float[Tensor, ""]
    """1 - β₂ᵗ"""
    beta1: Number
    beta2: Number
    eps: Number
    eps_root: Number
    weight_decay: Number


def adam_update(
    thetas: Leaves, grads: Leaves, ms: Leaves, vs: Leaves, *, numbers: AdamNumbers
) -> tuple[Leaves, Leaves, Leaves]:
    """The new (θ, m, v) of each leaf: θ in its own dtype, m and v at least in fp32."""
    dtype = wide(thetas[0].dtype)
    wide_thetas, grads, ms, vs = (_cast(xs, dtype) for xs in (thetas, grads, ms, vs))
    eta, bias1, bias2 = (_on(wide_thetas[0], x) for x in numbers[:3])
    numbers = AdamNumbers(eta, bias1, bias2, *numbers[3:])  # pyright: ignore[reportArgumentType]
    plain = not any(isinstance(x, Tensor) for x in numbers[3:])
    if plain and is_undisturbed(*_tensors(numbers), *wide_thetas, *grads, *ms, *vs):
        grads, ms, vs = (_like(wide_thetas, xs) for xs in (grads, ms, vs))
        new, ms, vs = _foreach(wide_thetas, grads, ms, vs, numbers)
    else:
        results = [reference(*xs, numbers) for xs in zip(wide_thetas, grads, ms, vs, strict=True)]
        new, ms, vs = ([result[i] for result in results] for i in range(3))
    return _cast(new, thetas[0].dtype), ms, vs


def reference(
    theta: Tensor, g: Tensor, m: Tensor, v: Tensor, numbers: AdamNumbers
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """The definition, for one leaf; all in one dtype."""
    eta, bias1, bias2, beta1, beta2, eps, eps_root, weight_decay = numbers
    m = torch.lerp(m, g, (1 - beta1).to(m.dtype) if isinstance(beta1, Tensor) else 1 - beta1)
    if isinstance(beta2, Tensor):
        v = (v * beta2 + (1 - beta2) * g * g).to(v.dtype)
    else:
        v = torch.addcmul(v * beta2, g, g, value=1 - beta2)
    square = v / bias2 + eps_root if _is_used(eps_root) else v / bias2
    step = (m / bias1) / (square.sqrt() + eps)
    if isinstance(weight_decay, Tensor):
        step = step + weight_decay * theta
    elif weight_decay:
        step = torch.add(step, theta, alpha=weight_decay)
    return theta - eta * step, m, v


def _foreach(
    thetas: Leaves, grads: Leaves, ms: Leaves, vs: Leaves, numbers: AdamNumbers
) -> tuple[Leaves, Leaves, Leaves]:
    """The same for all leaves at once. What is written in place was made here."""
    eta, bias1, bias2, *plain = numbers
    beta1, beta2, eps, eps_root, weight_decay = (float(x) for x in plain)
    ms = foreach._foreach_lerp(ms, grads, 1 - beta1)
    vs = foreach._foreach_mul(vs, beta2)
    foreach._foreach_addcmul_(vs, grads, grads, 1 - beta2)
    roots = foreach._foreach_div(vs, bias2)
    if eps_root:
        foreach._foreach_add_(roots, eps_root)
    foreach._foreach_sqrt_(roots)
    foreach._foreach_add_(roots, eps)
    steps = foreach._foreach_div(ms, bias1)
    foreach._foreach_div_(steps, roots)
    if weight_decay:
        foreach._foreach_add_(steps, thetas, alpha=weight_decay)
    foreach._foreach_mul_(steps, eta)
    return foreach._foreach_sub(thetas, steps), ms, vs


def _cast(xs: Leaves, dtype: torch.dtype) -> Leaves:
    """`xs` in `dtype`. To ask first is ten times as fast as `x.to` of each, if there is nothing to do."""
    return [x if x.dtype == dtype else x.to(dtype) for x in xs]


def _on(like: Tensor, x: Number) -> Number:
    """A scalar tensor on the device and in the dtype of a list of leaves, which CUDA's kernels of lists require."""
    return x.to(like.device, like.dtype) if isinstance(x, Tensor) else x


def _like(thetas: Leaves, xs: Leaves) -> Leaves:
    """`xs` in the memory order of `thetas`: CUDA's kernels of lists take leaves of one order, or else one by one."""
    return [
        x if x.stride() == theta.stride() else torch.empty_like(theta).copy_(x)
        for theta, x in zip(thetas, xs, strict=True)
    ]


def _tensors(numbers: AdamNumbers) -> list[Tensor]:
    return [x for x in numbers if isinstance(x, Tensor)]


def _is_used(x: Number) -> bool:
    """Whether a number may differ from 0."""
    return isinstance(x, Tensor) or x != 0
