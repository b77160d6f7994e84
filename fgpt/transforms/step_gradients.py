"""Other gradients of a training step than that of the batch's loss, for `make_step(.., gradient=)`:

    per_row_clipping    Σ_i g_i min(1, C / ‖g_i‖)                       each row bounded, as for privacy
    sharpness_aware     ∇ℓ(θ + ρ ∇ℓ / ‖∇ℓ‖)                             SAM
    zeroth_order        z (ℓ(θ + εz) - ℓ(θ - εz)) / 2ε,  z ~ N(0, 1)    MeZO, two forward passes
    forward_gradient    z (∇ℓ(θ) · z)                                   one forward pass with a derivative

Each returns (gradient, (Σ weight · nll, Σ weight)), sums over the batch as the step's own gradient does.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import jvp, vmap

from fgpt.errors import InputError
from fgpt.kernels import leaf_lists
from fgpt.kernels.dropout import normal_noise
from fgpt.kernels.functorch_state import in_transform_or_compile
from fgpt.kernels.precision import at_least_fp32, wide
from fgpt.losses import Batch, at_all_positions
from fgpt.optim import global_norm
from fgpt.rng import fold_in
from fgpt.sweeps import stack_batches
from fgpt.train_step import Gradient, Loss, value_and_grad, value_and_grad_of_member
from fgpt.transforms.per_example import chunks_by_width, square_norms
from fgpt.tree import leaves, tree_leaves, tree_map, unflatten_like

Tree: TypeAlias = Any


def per_row_clipping(max_norm: float) -> Gradient:
    """The sum of the gradients of the rows, each clipped to a norm. A row's loss is the sum over its tokens.

    Args:
        max_norm: C, the largest norm of a row's gradient.

    Raises:
        InputError: for a norm that is not positive, and from the step for a batch that is no `Batch`.

    Source: Abadi et al. 2016 (DP-SGD), algorithm 1, without its noise.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> base, optimizer = fgpt.init(config, fgpt.key(0)), fgpt.adamw(1e-2)
    >>> def loss(adapters, base, batch, seed):
    ...     return fgpt.nll(fgpt.adapt(base, adapters, rng=seed), batch)
    >>> step = fgpt.make_step(loss, optimizer, gradient=per_row_clipping(0.1), max_norm=None)
    >>> text = torch.tensor([[1, 2, 3], [4, 5, 6]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(2, 2))
    >>> state, metrics = step(fgpt.init_state(fgpt.lora(base, fgpt.key(0), rank=2), optimizer), base, [batch])
    >>> bool(metrics.grad_norm * metrics.weight <= 2 * 0.1)
    True
    """
    if not max_norm > 0:
        raise InputError(f"the largest norm of a row is {max_norm}: expected a positive number")

    def gradient(
        loss: Loss, tree: Tree, frozen: Tree, batch: Any, seed: Tensor | None
    ) -> tuple[Tree, tuple[Tensor, Tensor]]:
        sums: list[Tensor] = []
        for indices, rows in _row_chunks(batch):
            seeds = None if seed is None else torch.stack([fold_in(seed, i) for i in indices])
            grads, (values, weights) = _row_gradients(loss, tree, frozen, rows, seeds)
            factors = (max_norm / square_norms(grads).sqrt().clamp(min=1e-30)).clamp(max=1.0)
            clipped = [torch.tensordot(factors.to(wide(g.dtype)), at_least_fp32(g), 1) for g in tree_leaves(grads)]
            part = [*clipped, values.sum(), weights.sum()]
            sums = [*leaf_lists.add(sums, part)] if sums else part
        *clipped, value, weight = sums
        return unflatten_like(tree, clipped), (value, weight)

    return gradient


def _row_gradients(
    loss: Loss, tree: Tree, frozen: Tree, rows: Batch, seeds: Tensor | None
) -> tuple[Tree, tuple[Tensor, Tensor]]:
    """The gradient, value and weight of each row, along a first axis."""
    n = len(rows.tokens)
    if n == 1:
        row, seed = tree_map(lambda x: x[0], rows), None if seeds is None else seeds[0]
        return tree_map(lambda x: x[None], value_and_grad(loss, tree, frozen, row, seed))

    def of_row(tree: Tree, row: Batch, seed: Tensor | None) -> Any:
        return value_and_grad_of_member(loss, tree, frozen, row, seed)

    copies = tree_map(lambda x: x.expand(n, *x.shape), tree)
    return vmap(of_row, in_dims=(0, 0, None if seeds is None else 0))(copies, rows, seeds)


CHUNK_POSITIONS = 256
"""Positions, padding included, of the rows that a CPU computes at once; of a large batch a quarter. Fewer take more
calls, more need more padding.
"""


def _row_chunks(batch: Any) -> Iterator[tuple[Sequence[int], Batch]]:
    """Indices of rows of the batch, and these rows with an axis of rows, each a batch of one row.

    On a CPU they are rows of about one length, without the positions after their last weight, and with a loss only
    where one of them has a weight. A GPU would wait for the lengths: it takes all rows as they are, as transforms do.
    """
    if not isinstance(batch, Batch):
        raise InputError(f"per_row_clipping takes the rows of a Batch apart: got a {type(batch).__name__}")
    if batch.tokens.ndim != 2:
        shape = list(batch.tokens.shape)
        raise InputError(f"per_row_clipping takes the rows of tokens [rows seq] apart: got tokens of shape {shape}")
    is_plain = type(batch) is Batch and batch.segments is None and batch.tokens.device.type == "cpu"
    if not is_plain or in_transform_or_compile():
        yield range(len(batch.tokens)), tree_map(lambda x: x[:, None], at_all_positions(batch))
        return
    rows = [_without_end(batch, i) for i in range(len(batch.tokens))]
    widths = [row.tokens.shape[1] for row in rows]
    for indices in chunks_by_width(widths, max(CHUNK_POSITIONS, sum(widths) // 4)):
        (stacked,) = stack_batches([[rows[i]] for i in indices])
        yield indices, stacked


def _without_end(batch: Batch, row: int) -> Batch:
    """A row without the positions after its last weight, of which no position with a weight sees anything."""
    positions = batch.weights[row].nonzero().flatten()
    end = int(positions[-1]) + 1 if len(positions) else 1
    part = (slice(row, row + 1), slice(end))
    return Batch(batch.tokens[part], batch.targets[part], batch.weights[part], loss_positions=positions)


def sharpness_aware(rho: float = 0.05) -> Gradient:
    """The gradient at the nearby point of the highest loss, to first order.

    Args:
        rho: ρ, the distance.

    Raises:
        InputError: for a distance that is not positive.

    Source: Foret et al. 2021 (SAM), equation 3.

    >>> gradient = sharpness_aware(0.1)
    >>> def loss(tree, frozen, batch, seed):
    ...     return (tree["w"] ** 2).sum(), torch.tensor(1.0)
    >>> grads, _ = gradient(loss, {"w": torch.tensor([1.0])}, None, None, None)
    >>> grads["w"]  # of w², at 1.1
    tensor([2.2000])
    """
    if not rho > 0:
        raise InputError(f"rho is {rho}: expected a positive number")

    def gradient(
        loss: Loss, tree: Tree, frozen: Tree, batch: Any, seed: Tensor | None
    ) -> tuple[Tree, tuple[Tensor, Tensor]]:
        first, values = value_and_grad(loss, tree, frozen, batch, seed)
        scale = rho / (global_norm(first) + 1e-12)
        nearby = tree_map(lambda x, g: x + (scale * g).to(x.dtype), tree, first)
        return value_and_grad(loss, nearby, frozen, batch, seed)[0], values

    return gradient


def zeroth_order(epsilon: float = 1e-3) -> Gradient:
    """An estimate of the gradient from two forward passes: no activation is kept for a backward.

    Args:
        epsilon: ε, half the distance of the two points in each element of z.

    Raises:
        InputError: for a distance that is not positive, and from the step without a key, which draws z.

    Source: Malladi et al. 2023 (MeZO), definition 1.

    >>> gradient = zeroth_order(1e-3)
    >>> def loss(tree, frozen, batch, seed):
    ...     return (3 * tree["w"]).sum(), torch.tensor(1.0)
    >>> tree = {"w": torch.zeros(2, dtype=torch.float64)}
    >>> each = vmap(lambda seed: gradient(loss, tree, None, None, seed)[0]["w"])(torch.arange(4000))
    >>> bool((each.mean(0) - 3).abs().max() < 0.5)  # the mean of many is the gradient
    True
    """
    if not epsilon > 0:
        raise InputError(f"epsilon is {epsilon}: expected a positive number")

    def gradient(
        loss: Loss, tree: Tree, frozen: Tree, batch: Any, seed: Tensor | None
    ) -> tuple[Tree, tuple[Tensor, Tensor]]:
        if seed is None:
            raise InputError("zeroth_order draws a direction: give the step a key")
        by_path = leaves(tree)
        if rounded := [path for path, x in by_path.items() if x.dtype not in (torch.float32, torch.float64)]:
            raise InputError(
                f"{rounded[0]} is in {by_path[rounded[0]].dtype}, which rounds x ± εz: expected fp32 or fp64"
            )
        z = _normal_direction(tree, seed)

        def at(sign: float) -> tuple[Tensor, Tensor]:
            return loss(tree_map(lambda x, d: x + sign * epsilon * d, tree, z), frozen, batch, seed)

        (above, weight), (below, _) = at(1.0), at(-1.0)  # nothing is recorded, unless a leaf of theirs requires grad
        slope = (above - below) / (2 * epsilon)
        return tree_map(lambda d: slope.to(d.dtype) * d, z), ((above + below) / 2, weight)

    return gradient


def forward_gradient() -> Gradient:
    """An unbiased estimate of the gradient, z (∇ℓ · z), from one forward pass that carries the derivative along z:
    nothing depends on a distance, as it does in `zeroth_order`. No activation is kept for a backward, but each layer
    holds the derivatives beside its activations: of few layers it saves no memory.

    Its variance is about that of the gradient times the number of elements of θ: train few of them, at a small rate.

    Raises:
        InputError: from the step without a key, which draws z.

    Source: Baydin et al. 2022, "Gradients without Backpropagation", definition 1.

    >>> gradient = forward_gradient()
    >>> def loss(tree, frozen, batch, seed):
    ...     return (tree["w"] ** 2).sum(), torch.tensor(1.0)
    >>> tree = {"w": torch.ones(2, dtype=torch.float64)}
    >>> each = vmap(lambda seed: gradient(loss, tree, None, None, seed)[0]["w"])(torch.arange(4000))
    >>> bool((each.mean(0) - 2).abs().max() < 0.3)  # the mean of many is the gradient
    True
    """

    def gradient(
        loss: Loss, tree: Tree, frozen: Tree, batch: Any, seed: Tensor | None
    ) -> tuple[Tree, tuple[Tensor, Tensor]]:
        if seed is None:
            raise InputError("forward_gradient draws a direction: give the step a key")
        z = _normal_direction(tree, seed)
        derivative: Any = jvp(lambda x: loss(x, frozen, batch, seed), (tree,), (z,), has_aux=True)
        value, slope, weight = derivative
        return tree_map(lambda d: slope.to(d.dtype) * d, z), (value, weight)

    return gradient


def _normal_direction(tree: Tree, seed: Tensor) -> Tree:
    """z ~ N(0, 1) for each element of the tree."""
    draws: list[Tensor] = []
    for path, x in leaves(tree).items():
        noise = normal_noise(fold_in(seed, f"z of {path}").to(x.device), x.numel())
        draws.append(noise.view(x.shape).to(x.dtype))
    return unflatten_like(tree, draws)
