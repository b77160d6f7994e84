"""One update of schedule-free AdamW over a list of leaves, of one dtype and with or without decay:

    v ← β₂v + (1-β₂)g²        d = g / (√(v + ε₀) + ε) + λy        y ← y + c(z - y) - η(1 - β₁(1-c))d        z ← z - ηd

    reference     leaf by leaf, out of place
    fast path     torch._foreach_*: one kernel for many leaves. It writes into temporaries of its own, never into an
                  argument
    transforms    under vmap, derivatives and compilation the reference runs, which is plain torch; and so it does for
                  numbers that are tensors

All of it is computed at least in fp32. Without η's warmup and with c = 1/t, x = z + (y - z) / β₁ is the mean of all z.

Source: Defazio et al. 2024, "The Road Less Scheduled", algorithm 1.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.adam import Number
from fgpt.kernels.functorch_state import is_undisturbed
from fgpt.kernels.leaf_lists import foreach
from fgpt.kernels.precision import wide

Leaves: TypeAlias = Sequence[Tensor]


class ScheduleFreeNumbers(NamedTuple):
    """The numbers of one update. λ is for the leaves that decay."""

    eta: Float[Tensor, ""]
    """The learning rate, with its bias correction."""
    average: Float[Tensor, ""]
    """c, the weight of this step's z in the average x."""
    beta1: Number
    beta2: Number
    eps: Number
    eps_root: Number
    weight_decay: Number


def schedule_free_update(
    ys: Leaves, grads: Leaves, zs: Leaves, vs: Leaves, *, numbers: ScheduleFreeNumbers
) -> tuple[Leaves, Leaves, Leaves]:
    """The new (y, z, v) of each leaf: y in its own dtype, z and v at least in fp32."""
    stored, dtype = ys[0].dtype, wide(ys[0].dtype)
    ys, grads, zs, vs = ([x if x.dtype == dtype else x.to(dtype) for x in xs] for xs in (ys, grads, zs, vs))
    eta, average = (x.to(ys[0].device, dtype) for x in numbers[:2])
    numbers = ScheduleFreeNumbers(eta, average, *numbers[2:])
    plain = not any(isinstance(x, Tensor) for x in numbers[2:])
    if plain and is_undisturbed(eta, average, *ys, *grads, *zs, *vs):
        new, zs, vs = _foreach(ys, grads, zs, vs, numbers)
    else:
        results = [reference(*xs, numbers) for xs in zip(ys, grads, zs, vs, strict=True)]
        new, zs, vs = ([result[i] for result in results] for i in range(3))
    return [x if x.dtype == stored else x.to(stored) for x in new], zs, vs


def reference(
    y: Tensor, g: Tensor, z: Tensor, v: Tensor, numbers: ScheduleFreeNumbers
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """The definition, for one leaf; all in one dtype."""
    eta, average, beta1, beta2, eps, eps_root, weight_decay = numbers
    v = (v * beta2 + (1 - beta2) * g * g).to(v.dtype)
    step = g / ((v + eps_root).sqrt() + eps) + weight_decay * y
    share = 1 - beta1 * (1 - average)
    return (y + average * (z - y) - eta * share * step).to(y.dtype), (z - eta * step).to(z.dtype), v


def _foreach(
    ys: Leaves, grads: Leaves, zs: Leaves, vs: Leaves, numbers: ScheduleFreeNumbers
) -> tuple[Leaves, Leaves, Leaves]:
    """The same for all leaves at once. What is written in place was made here."""
    eta, average, *plain = numbers
    beta1, beta2, eps, eps_root, weight_decay = (float(x) for x in plain)
    vs = foreach._foreach_mul(vs, beta2)
    foreach._foreach_addcmul_(vs, grads, grads, 1 - beta2)
    roots = foreach._foreach_add(vs, eps_root)
    foreach._foreach_sqrt_(roots)
    foreach._foreach_add_(roots, eps)
    steps = foreach._foreach_div(grads, roots)
    if weight_decay:
        foreach._foreach_add_(steps, ys, alpha=weight_decay)
    differences = foreach._foreach_sub(zs, ys)
    foreach._foreach_mul_(differences, average)
    new = foreach._foreach_add(ys, differences)
    foreach._foreach_mul_(steps, eta)
    zs = foreach._foreach_sub(zs, steps)
    foreach._foreach_mul_(steps, 1 - beta1 * (1 - average))
    return foreach._foreach_sub(new, steps), zs, vs
