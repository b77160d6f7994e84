"""Schedule-free AdamW: an average of the iterates in place of a decay of the learning rate."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.adam import Number
from fgpt.kernels.leaf_lists import groups
from fgpt.kernels.schedule_free import ScheduleFreeNumbers, schedule_free_update
from fgpt.optim import NO_MULTIPLIERS, Optimizer, Schedule, Tree, constant_schedule
from fgpt.optim_leaves import check_multipliers, decay_mask, leaves_of, lr_patterns
from fgpt.patterns import matching
from fgpt.tree import device, node, tree_map, unflatten_like


@node
class ScheduleFreeState:
    """The state of `schedule_free_adamw`.

    Args:
        z: The iterate of each leaf; what is trained is y, between z and its average x.
        nu: The second moment of each leaf.
        lr_max: The largest learning rate so far.
        weight_sum: The sum of the squared `lr_max` of all updates.
        count: The number of updates so far, an integer.

    >>> schedule_free_adamw(0.1).init({"w": torch.ones(2)}).z
    {'w': tensor([1., 1.])}
    """

    z: Tree
    nu: Tree
    lr_max: Float[Tensor, ""]
    weight_sum: Float[Tensor, ""]
    count: Int[Tensor, ""]


def schedule_free_adamw(
    lr: Number | Schedule,
    betas: tuple[Number, Number] = (0.9, 0.999),
    *,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decay: str = ".*",
    eps_root: Number = 0.0,
    lr_multipliers: Mapping[str, Number] = NO_MULTIPLIERS,
) -> Optimizer:
    """Schedule-free AdamW: z ← z - ηd; x ← (1-c)x + cz; y = (1-β₁)z + β₁x, with d as AdamW's without momentum.

    The params that are trained are y, where gradients are taken. The average x is what is evaluated and saved:
    `optimizer.evaluation_params(state, params)`. η has no decay and may have a warmup, `constant_schedule(lr, steps)`;
    c weighs each z by the square of the largest η so far.

    Args:
        lr: η, a number or a schedule; some ten times that of AdamW with decay, say the authors.
        betas: β₁, the share of x in y, and β₂.
        eps: ε.
        weight_decay: λ, at y, for leaves of two dimensions or more.
        decay: A regular expression; only leaves whose whole path matches it decay.
        eps_root: ε₀, as in `adamw`.
        lr_multipliers: As in `adamw`.

    Each number may be a scalar tensor, to be mapped over or differentiated.

    Raises:
        InputError: if β₁ is not above 0, so that x would not follow from y and z; and as `adamw` does.

    Source: Defazio et al. 2024, "The Road Less Scheduled", section 2 and algorithm 1.

    >>> optimizer = schedule_free_adamw(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> params, state = optimizer.update({"w": torch.ones(2)}, optimizer.init(params), params)
    >>> optimizer.evaluation_params(state, params)["w"]  # after one update x, y and z are equal
    tensor([0.9000, 0.9000])
    """
    matching(decay, [])
    check_multipliers(lr_multipliers)
    beta1, beta2 = betas
    if not isinstance(beta1, Tensor) and not 0 < beta1 < 1:
        raise InputError(f"beta 1 of schedule-free AdamW is {beta1}: expected a number above 0 and below 1")
    schedule = lr if callable(lr) else constant_schedule(lr)
    has_decay = isinstance(weight_decay, Tensor) or weight_decay != 0

    def init(params: Tree) -> ScheduleFreeState:
        check_multipliers(lr_multipliers, params)
        zero = torch.zeros((), dtype=torch.float64, device=device(params))
        z, nu = tree_map(torch.clone, params), tree_map(torch.zeros_like, params)
        return ScheduleFreeState(z, nu, zero, zero.clone(), torch.zeros_like(zero, dtype=torch.int64))

    def update(grads: Tree, state: ScheduleFreeState, params: Tree) -> tuple[Tree, ScheduleFreeState]:
        ys, gs, zs, vs = leaves_of(params, grads, state.z, state.nu)
        count = state.count.to(device(params))
        eta = schedule(count) * (1 - beta2 ** (count + 1).double()).sqrt()
        lr_max = torch.maximum(state.lr_max.to(eta.device), eta.double())
        weight = lr_max.square()
        weight_sum = state.weight_sum.to(eta.device) + weight
        average = weight / weight_sum.clamp(min=torch.finfo(torch.float64).tiny)  # 0 while all rates are
        numbers = ScheduleFreeNumbers(eta, average, beta1, beta2, eps, eps_root, weight_decay)
        decays = decay_mask(params, decay) if has_decay else [False] * len(ys)
        patterns = lr_patterns(params, lr_multipliers)
        new: list[list[Any]] = [list(ys), list(zs), list(vs)]
        for indices in groups(ys, [(y.dtype, decays[i], patterns[i]) for i, y in enumerate(ys)]):
            chosen = numbers if decays[indices[0]] else numbers._replace(weight_decay=0.0)
            if (pattern := patterns[indices[0]]) is not None:
                chosen = chosen._replace(eta=eta * lr_multipliers[pattern])
            lists = [[xs[i] for i in indices] for xs in (ys, gs, zs, vs)]
            for results, old, column in zip(schedule_free_update(*lists, numbers=chosen), (ys, zs, vs), new):
                for i, x in zip(indices, results, strict=True):
                    column[i] = x.to(old[i].dtype)
        y, z, nu = (unflatten_like(params, column) for column in new)
        return y, ScheduleFreeState(z, nu, lr_max, weight_sum, count + 1)

    def evaluation_params(state: ScheduleFreeState, params: Tree) -> Tree:
        """x, from y = (1-β₁)z + β₁x."""
        return tree_map(lambda y, z: y + ((1 - 1 / beta1) * (z - y)).to(y.dtype), params, state.z)

    return Optimizer(init, update, evaluation_params)
