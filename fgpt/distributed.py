"""Data parallel over the processes of torch.distributed, as torchrun starts them:

    Σ gradient, Σ weight · nll, Σ weight  =  one all_reduce of each rank's sums, as one vector

Micro-batch i of an update belongs to rank i mod N, and its seed to its number, so N processes take the step of one
process with all micro-batches, up to the order of summation. Every rank holds the whole state, and ends with the same.

    step = make_step(loss, optimizer, world=world())
    torchrun --nproc-per-node 2 train.py        with init_process_group("gloo") on CPUs, "nccl" on GPUs

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", section 2.2.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Its functions keep for ever the group that is there at its import, and bitsandbytes imports it late. A group's
    # thread that lives until Python ends can abort the process then (SIGABRT): so it is imported before any group.
    import torch.distributed.nn.functional

from fgpt.tree import tree_leaves, tree_map, unflatten_like

T = TypeVar("T")
R = TypeVar("R")


class World(NamedTuple):
    """The processes that compute together.

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


ALONE = World(0, 1)
"""A process by itself."""


_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)


def world() -> World:
    """The default process group of torch.distributed; `ALONE` if none was initialized, and within `alone()`.

    >>> world()
    World(rank=0, size=1)
    """
    if _is_alone.get() or not dist.is_available() or not dist.is_initialized():
        return ALONE
    return World(dist.get_rank(), dist.get_world_size())


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process computes by itself, as the others do: each rank another training, such as members of a
    sweep. `world()` is `ALONE`, and nothing is exchanged.

    >>> with alone():
    ...     world()
    World(rank=0, size=1)
    """
    before = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(before)


def sum_over_ranks(tree: T) -> T:
    """The sum of each leaf over all ranks, in at least fp32 and in its own dtype: one message for all leaves.

    >>> sum_over_ranks({"w": torch.ones(2)})  # of a process by itself
    {'w': tensor([1., 1.])}
    """
    if world().size == 1:
        return tree
    parts: list[Tensor] = tree_leaves(tree)
    flat = torch.cat([x.to(torch.promote_types(x.dtype, torch.float32)).flatten() for x in parts])
    dist.all_reduce(flat)
    sums = [x.view_as(part).to(part.dtype) for x, part in zip(flat.split([x.numel() for x in parts]), parts)]
    return unflatten_like(tree, sums)


def from_first_rank(tree: T) -> T:
    """The leaves that rank 0 has, on every rank; those of the others give only shapes and dtypes.

    >>> from_first_rank({"w": torch.ones(2)})  # of a process by itself
    {'w': tensor([1., 1.])}
    """
    if world().size == 1:
        return tree

    def receive(x: Tensor) -> Tensor:
        copy = x.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(copy, 0)
        return copy

    return tree_map(receive, tree)


def object_from_first_rank(value: T) -> T:
    """What rank 0 gives, on every rank: anything that pickle takes.

    >>> object_from_first_rank("runs/lora-nano")  # of a process by itself
    'runs/lora-nano'
    """
    if world().size == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. All ranks ask at the same place of the program.

    >>> any_rank(True)  # of a process by itself
    True
    """
    if world().size == 1:
        return flag
    flags = torch.tensor(float(flag))  # on the CPU: nobody waits for a GPU
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def gather_objects(value: T) -> list[T]:
    """What each rank gives, in the order of the ranks, on every rank: anything that pickle takes.

    >>> gather_objects("a")  # of a process by itself
    ['a']
    """
    count = world().size
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values


def map_over_ranks(fn: Callable[[T], R], items: Sequence[T], here: World | None = None) -> Iterator[R]:
    """fn of each item, in order, on every rank; item i is computed by rank i mod N. All call fn equally often.

    Args:
        fn: A function whose results pickle takes, and whose tensors are on the CPU.
        items: The same on all ranks.
        here: `world()`, which is None's meaning too, or `ALONE`.

    >>> list(map_over_ranks(len, ["a", "bc"]))  # of a process by itself
    [1, 2]
    """
    here = world() if here is None else here
    if here.size == 1:
        yield from map(fn, items)
        return
    for first in range(0, len(items), here.size):
        together = items[first : first + here.size]
        results_of_rank = [fn(item) for item in here.share(together)]
        if not results_of_rank:
            fn(together[0])  # over a base in parts the others multiply with this one's, too
        for results in gather_objects(results_of_rank):
            yield from results
