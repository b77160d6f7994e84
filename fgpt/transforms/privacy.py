"""Differentially private steps: what one row can add to a step is bounded, and noise of that size hides it.

    θ ← update( (Σ_i g_i min(1, C / ‖g_i‖) + N(0, σ² C²)) / L )        i: each row with probability q,  L = q n

The sum goes over all micro-batches of the step, and the noise is added to it once. L is the expected number of rows and
no count of them, and whatever the optimizer makes of the quotient is no less private: DP-SGD and DP-Adam are this step
with another optimizer. `fgpt.transforms.privacy_accounting` says what ε comes of σ, q and the number of steps.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fgpt.distributed import ALONE, World
from fgpt.errors import InputError
from fgpt.kernels import leaf_lists
from fgpt.kernels.dropout import normal_noise
from fgpt.losses import Batch
from fgpt.optim import Optimizer
from fgpt.rng import fold_in
from fgpt.train_step import Loss, Step, make_step
from fgpt.transforms.step_gradients import per_row_clipping
from fgpt.tree import leaves, tree_leaves, tree_map, unflatten_like

Tree: TypeAlias = Any


class GaussianMechanism(NamedTuple):
    """What a private step does to the gradients of its rows.

    Args:
        max_norm: C, the largest norm of a row's gradient.
        noise_multiplier: σ, the standard deviation of the noise on the sum, in units of C.
        lot_size: L, the expected number of rows in a step: the divisor of the sum.

    >>> GaussianMechanism(max_norm=0.1, noise_multiplier=1.0, lot_size=64.0).noise_multiplier
    1.0
    """

    max_norm: float
    noise_multiplier: float
    lot_size: float

    def check(self) -> None:
        """Raises InputError for numbers that are no mechanism. A noise of 0 clips alone, and is not private."""
        for name, value in (("max_norm", self.max_norm), ("lot_size", self.lot_size)):
            if not 0 < value < math.inf:
                raise InputError(f"{name} is {value}: expected a positive number")
        if not 0 <= self.noise_multiplier < math.inf:
            raise InputError(f"noise_multiplier is {self.noise_multiplier}: expected 0 or more, such as 1.0")


def private_step(
    loss: Loss,
    optimizer: Optimizer,
    mechanism: GaussianMechanism,
    *,
    prepare: Callable[[Tree, Tree], Tree] | None = None,
    world: World = ALONE,
) -> Step:
    """The step of `make_step` by clipped gradients of rows, and noise on their sum.

    A row is what is protected, so that each holds one example: packed rows are refused. A step without batches, or
    whose rows have no weight, is one of noise alone, as a lot that is sampled may be empty; its loss is 0, of weight 0.
    The loss of a row must not depend on other rows. Loss and weight in the metrics have no noise, and are not private.

    Args:
        loss: As in `make_step`; it is called for each row by itself, as a batch of one row.
        optimizer: Any one: what it does is arithmetic on what is private already.
        mechanism: The bound, the noise and the divisor.
        prepare: As in `make_step`.
        world: As in `make_step`. The noise is of the whole sum, the same on all ranks.

    Raises:
        InputError: for numbers that are no mechanism; from the step without a key, which draws the noise, and for
            packed rows or a batch that is no `Batch`.

    Source: Abadi et al. 2016 (DP-SGD), algorithm 1; Li et al. 2022, "Large Language Models Can Be Strong Differentially
    Private Learners", for AdamW and the divisor.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> base, optimizer = fgpt.init(config, fgpt.key(0)), fgpt.adamw(1e-2)
    >>> def loss(adapters, base, batch, seed):
    ...     return fgpt.nll(fgpt.adapt(base, adapters, rng=seed), batch)
    >>> text = torch.tensor([[1, 2, 3], [4, 5, 6]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(2, 2))
    >>> state = fgpt.init_state(fgpt.lora(base, fgpt.key(0), rank=2), optimizer)
    >>> step = private_step(loss, optimizer, GaussianMechanism(max_norm=0.1, noise_multiplier=0.0, lot_size=2.0))
    >>> _, metrics = step(state, base, [batch], fgpt.key(1))
    >>> bool(metrics.grad_norm <= 0.1)  # of two rows, divided by two
    True
    """
    mechanism.check()
    clipped_gradient = per_row_clipping(mechanism.max_norm)

    def gradient(
        loss: Loss, tree: Tree, frozen: Tree, batch: Any, seed: Tensor | None
    ) -> tuple[Tree, tuple[Tensor, Tensor]]:
        if batch is None:
            nothing = torch.zeros((), device=tree_leaves(tree)[0].device)
            return tree_map(torch.zeros_like, tree), (nothing, nothing)
        if isinstance(batch, Batch) and batch.segments is not None:
            raise InputError("a packed row holds several examples, and a private step protects one: give each its row")
        return clipped_gradient(loss, tree, frozen, batch, seed)

    def finish(grads: Tree, weight: Tensor, seed: Tensor | None) -> tuple[Tree, Tensor]:
        if seed is None:
            raise InputError("a private step draws noise: give it a key, another one for each step")
        noisy = with_normal_noise(grads, mechanism.noise_multiplier * mechanism.max_norm, seed)
        return noisy, torch.full_like(weight, mechanism.lot_size)

    step = make_step(loss, optimizer, max_norm=None, prepare=prepare, gradient=gradient, finish=finish, world=world)
    return lambda state, frozen, batches, rng=None: step(state, frozen, batches or [None], rng)


def with_normal_noise(tree: Tree, std: float, seed: Tensor) -> Tree:
    """`tree` with normal noise on each element of each leaf, all of it of one sequence that the seed decides.

    Args:
        tree: Tensors.
        std: The standard deviation.
        seed: The seed of a key.

    >>> noisy = with_normal_noise({"w": torch.zeros(2, 5000)}, 2.0, torch.tensor(7))
    >>> noisy["w"].shape, round(float(noisy["w"].std()), 1)
    (torch.Size([2, 5000]), 2.0)
    """
    xs = tree_leaves(tree)
    noisy = list(xs)
    first = 0
    for indices in leaf_lists.groups(xs, [0] * len(xs)):  # one call of the hash for many leaves
        sizes = [xs[i].numel() for i in indices]
        noise = std * normal_noise(seed.to(xs[indices[0]].device), sum(sizes), first)
        for i, part in zip(indices, noise.split(sizes), strict=True):
            noisy[i] = xs[i] + part.view(xs[i].shape).to(xs[i].dtype)
        first += sum(sizes)
    return unflatten_like(tree, noisy)


def sample_lot(num_examples: int, sampling_rate: float, rng: torch.Generator) -> list[int]:
    """The examples of a step: each with probability `sampling_rate`, whatever the others do. Now and then none.

    Args:
        num_examples: n.
        sampling_rate: q, above 0, at most 1.
        rng: The key of the step.

    Raises:
        InputError: for a rate that is no probability above 0.

    Source: Abadi et al. 2016 (DP-SGD), algorithm 1: Poisson sampling, of which accounting says how much privacy it
    adds. Batches of a shuffled epoch are others, and have less.

    >>> import fgpt
    >>> sample_lot(10, 0.3, fgpt.key(1))
    [6, 8]
    """
    if not 0 < sampling_rate <= 1:
        raise InputError(f"sampling_rate is {sampling_rate}: expected a probability above 0, at most 1")
    draws = torch.rand(num_examples, generator=fold_in(rng, "lot"), dtype=torch.float64)
    return (draws < sampling_rate).nonzero().flatten().tolist()


def leaves_without_gradient(loss: Loss, trainable: Tree, frozen: Tree, batches: Sequence[Any]) -> list[str]:
    """The paths of leaves whose gradient is zero for every row of `batches`: noise alone would move them, and nothing
    would show that they learn nothing.

    It is computed a little beside `trainable`, as the gradient of a LoRA's A is 0 at its start.

    Args:
        loss: As in `make_step`.
        trainable: What is trained.
        frozen: What is not.
        batches: Rows to look at.

    >>> import fgpt
    >>> def loss(tree, frozen, batch, seed):
    ...     return (tree["used"] * batch.weights).sum(), batch.weights.sum()
    >>> x = torch.ones(2, 3)
    >>> tree = {"used": torch.zeros(3), "unused": torch.zeros(3)}
    >>> leaves_without_gradient(loss, tree, None, [fgpt.Batch(x.long(), x.long(), x)])
    ['unused']
    """
    nearby = with_normal_noise(trainable, 1e-2, torch.tensor(0))
    silent = list(leaves(trainable))
    for batch in batches:
        gradient = leaves(per_row_clipping(1.0)(loss, nearby, frozen, batch, None)[0])
        silent = [path for path in silent if not gradient[path].any()]
        if not silent:
            break
    return silent
