"""Data parallel over the processes of torch.distributed, as torchrun starts them:

    Σ gradient, Σ weight · nll, Σ weight  =  one all_reduce of each rank's sums, as one vector

Micro-batch i of an update belongs to rank i mod N, and its seed to its number, so N processes take the step of one
process with all micro-batches, up to the order of summation. Every rank holds the whole state, and ends with the same.

    torchrun --nproc-per-node 2 train.py        with init_process_group("gloo") on CPUs, "nccl" on GPUs

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", section 2.2.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fgpt.kernels.precision import at_least_fp32
from fgpt.optim import Optimizer
from fgpt.train_step import Gradient, Key, Loss, Metrics, Seeds, State, Step, make_step, micro_batch_seeds
from fgpt.tree import device, tree_leaves, unflatten_like

T = TypeVar("T")


class World(NamedTuple):
    """The processes that train together.

    Args:
        rank: The number of this one, from 0.
        size: How many there are.

    >>> World(rank=1, size=2).share(["a", "b", "c", "d", "e"])
    ['b', 'd']
    """

    rank: int
    size: int

    def share(self, items: Sequence[T]) -> list[T]:
        """Those of the items that are this rank's: i mod size."""
        return list(items[self.rank :: self.size])


def world() -> World:
    """The default process group of torch.distributed; a process by itself if none was initialized.

    >>> world()
    World(rank=0, size=1)
    """
    if not dist.is_available() or not dist.is_initialized():
        return World(0, 1)
    return World(dist.get_rank(), dist.get_world_size())


def sum_over_ranks(tree: T) -> T:
    """The sum of each leaf over all ranks, in at least fp32 and in its own dtype: one message for all leaves.

    >>> sum_over_ranks({"w": torch.ones(2)})  # of a process by itself
    {'w': tensor([1., 1.])}
    """
    if world().size == 1:
        return tree
    parts: list[Tensor] = tree_leaves(tree)
    flat = torch.cat([at_least_fp32(x).flatten() for x in parts])
    dist.all_reduce(flat)
    sums = [x.view_as(part).to(part.dtype) for x, part in zip(flat.split([x.numel() for x in parts]), parts)]
    return unflatten_like(tree, sums)


def data_parallel_step(
    loss: Loss,
    optimizer: Optimizer,
    *,
    max_norm: float | None = 1.0,
    prepare: Callable[[Any, Any], Any] | None = None,
    gradient: Gradient | None = None,
) -> Step:
    """`make_step` over the processes of torch.distributed: each rank is given all micro-batches of the update, and
    computes the gradients of its own.

    Args:
        loss: As of `make_step`.
        optimizer: As of `make_step`.
        max_norm: As of `make_step`: of the whole gradient.
        prepare: As of `make_step`.
        gradient: As of `make_step`.

    Source: Li et al. 2020 (PyTorch Distributed), section 2.2.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, optimizer = fgpt.init(config, fgpt.key(0)), fgpt.adamw(0.01)
    >>> texts = [torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7]])]
    >>> batches = [fgpt.Batch(x[:, :-1], x[:, 1:], torch.ones(x[:, 1:].shape)) for x in texts]
    >>> def loss(adapters, params, batch, seed):
    ...     return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)
    >>> state = fgpt.init_state(fgpt.lora(params, fgpt.key(1), rank=2), optimizer)
    >>> state, metrics = data_parallel_step(loss, optimizer)(state, params, batches, fgpt.key(2))
    >>> metrics.weight  # of the micro-batches of all ranks
    tensor(5.)
    """
    step = make_step(loss, optimizer, max_norm=max_norm, prepare=prepare, gradient=gradient, reduce=sum_over_ranks)

    def parallel_step(
        state: State, frozen: Any, batches: Sequence[Any], rng: Key | Seeds | None = None
    ) -> tuple[State, Metrics]:
        here = world()
        own_seeds: Any = None  # `make_step`'s step takes seeds in place of their key
        if rng is not None:
            own_seeds = tuple(here.share(micro_batch_seeds(rng, len(batches), device(state.trainable))))
        return step(state, frozen, here.share(batches), own_seeds)

    return parallel_step
