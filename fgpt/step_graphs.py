"""Training steps as CUDA graphs: all kernels of a step, from the batch to the update, started by one call.

A step of a small model starts thousands of kernels that run for microseconds each, so that the CPU which starts them is
the limit.

    step = StepGraphs(make_step(loss, optimizer))
    state, metrics = step(state, frozen, batches, rng)      the same as the step's

A graph reads and writes tensors of its own. State, batches and seeds are copied into them before a replay, and what it
wrote is copied out: nothing that was returned is ever overwritten.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fgpt.errors import CompileWarning
from fgpt.kernels.cuda_graphs import Record, record_cuda_graph, side_stream, try_recording
from fgpt.train_step import Key, Metrics, State, Step, Tree, micro_batch_seeds
from fgpt.tree import device, tree_leaves, tree_map

MAX_GRAPHS = 8
"""Shapes of a step that are recorded."""


@dataclass
class _Shape:
    """What arguments must share to be given to one graph, and the graph, once it is recorded."""

    signature: Any
    inputs: Any = None
    replay: Callable[[], tuple[State, Metrics]] | None = None


class StepGraphs:
    """A step whose kernels are recorded, for each shape of its arguments once. The first step of a shape runs as it is,
    as kernels must be loaded before a recording; the second is recorded, and each replay is that step of its arguments.

    It takes two copies of the state more in memory, and does not pass transforms or derivatives. If a step cannot be
    recorded, or there are more shapes than `max_graphs`, a warning says so, and the steps run as they are.

    Args:
        step: A step of `make_step`, whose schedule is a function of the state's step.
        record: Makes a replay of a function. None records CUDA graphs, which share their memory.
        max_graphs: How many shapes are recorded.

    >>> import fgpt
    >>> optimizer = fgpt.adamw(0.1)
    >>> def loss(trainable, frozen, batch, seed):
    ...     return (trainable["w"] - batch).square().sum(), torch.tensor(1.0)
    >>> step = StepGraphs(fgpt.make_step(loss, optimizer), record=lambda run: run)
    >>> state, _ = step(fgpt.init_state({"w": torch.zeros(2)}, optimizer), None, [torch.ones(2)])
    >>> state.trainable["w"]
    tensor([0.1000, 0.1000])
    """

    def __init__(self, step: Step, *, record: Record | None = None, max_graphs: int = MAX_GRAPHS) -> None:
        self._step: Any = step  # which takes seeds
        self._record, self._max_graphs = record or _recorder(), max_graphs
        self._frozen: Tree = None
        self._shapes: list[_Shape] = []
        self._is_full = self._has_failed = False

    def __call__(
        self, state: State, frozen: Tree, batches: Sequence[Any], rng: Key | None = None
    ) -> tuple[State, Metrics]:
        """As the step. `frozen` is the same object at each call; with another one all is recorded anew."""
        at = device(state.trainable)
        seeds = None if rng is None else micro_batch_seeds(rng, len(batches), at)
        if self._has_failed:
            return self._step(state, frozen, batches, seeds)
        if frozen is not self._frozen:
            self._frozen, self._shapes, self._is_full = frozen, [], False
        arguments = state, list(batches), seeds or ()
        shape = self._find(_signature(arguments, seeds is None))
        if shape is None or shape.inputs is None:
            if shape is not None:
                shape.inputs = ()
            with side_stream(at):
                return self._step(state, frozen, batches, seeds)
        if shape.replay is None:
            shape.inputs = tree_map(torch.clone, arguments)
            fixed_state, fixed_batches, fixed_seeds = shape.inputs
            fixed_seeds = None if seeds is None else tuple(fixed_seeds)
            shape.replay = try_recording(
                self._record,
                lambda: self._step(fixed_state, frozen, fixed_batches, fixed_seeds),
                at=at,
                name="training",
            )
            if shape.replay is None:
                self._has_failed, self._shapes = True, []
                return self._step(state, frozen, batches, seeds)
        _copy_into(shape.inputs, arguments)
        return tree_map(torch.clone, shape.replay())

    def _find(self, signature: Any) -> _Shape | None:
        """What is known of a shape; None if there are too many."""
        for shape in self._shapes:
            if shape.signature == signature:
                return shape
        if len(self._shapes) < self._max_graphs:
            self._shapes.append(_Shape(signature))
            return self._shapes[-1]
        if not self._is_full:
            self._is_full = True
            warnings.warn(
                f"training without a CUDA graph where a step has another shape than the first {self._max_graphs}",
                CompileWarning,
                stacklevel=3,
            )
        return None


def _signature(arguments: Any, *others: Any) -> Any:
    leaves, structure = pytree.tree_flatten(arguments)
    return structure, others, [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]


def _copy_into(fixed: Any, arguments: Any) -> None:
    for x, new in zip(tree_leaves(fixed), tree_leaves(arguments), strict=True):
        x.copy_(new)


def _recorder() -> Record:
    """`record_cuda_graph`, with one pool of memory: no two of these graphs run at once, and what one has written is
    copied before the next one runs.
    """
    pool = functools.cache(torch.cuda.graph_pool_handle)
    return lambda run: record_cuda_graph(run, pool())
