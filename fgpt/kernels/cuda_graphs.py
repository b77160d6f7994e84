"""CUDA graphs: the kernels of a function, which are recorded once and started by one call from then on.

A graph repeats its kernels on the tensors of the recording. What Python computes, and what stays on the CPU, is frozen
in it: a learning rate, the seed of a dropout.

Source: the pytorch documentation, "CUDA semantics", section CUDA Graphs.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

from fgpt.errors import CompileWarning, InputError, one_line

Record: TypeAlias = Callable[[Callable[[], Any]], Callable[[], Any]]
"""From a function to a replay of its kernels: it computes the same again, from the tensors' values of that time."""


def is_capturing() -> bool:
    """Whether a CUDA graph is captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def record_cuda_graph(run: Callable[[], Any], pool: Any = None) -> Callable[[], Any]:
    """The kernels of `run`, which it does not execute yet. Every replay writes its result into the same tensors.

    Args:
        run: A function of tensors on the current device.
        pool: Where its memory comes from, such as `torch.cuda.graph_pool_handle()`; None is a pool of its own.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def try_recording(record: Record, run: Callable[[], Any], *, at: torch.device, name: str) -> Callable[[], Any] | None:
    """A replay of `run`; None, with a warning that says why, if it cannot be recorded.

    Args:
        record: `record_cuda_graph`, or what stands for it.
        run: The function.
        at: The device that it computes on.
        name: What the warning says of it, such as "decoding".
    """
    try:
        with torch.cuda.device(at) if at.type == "cuda" else contextlib.nullcontext():
            return record(run)
    except (RuntimeError, InputError) as err:
        reason = one_line(str(err).strip().partition("\n")[0])
        warnings.warn(
            f"{name} without a CUDA graph, as the step cannot be recorded: {reason}", CompileWarning, stacklevel=4
        )
        return None


@contextlib.contextmanager
def side_stream(at: torch.device) -> Iterator[None]:
    """Another stream than the current one, as libraries must be warm for the stream of a recording. None on a CPU."""
    if at.type != "cuda":
        yield
        return
    current, other = torch.cuda.current_stream(at), torch.cuda.Stream(at)
    other.wait_stream(current)
    with torch.cuda.stream(other):
        yield
    current.wait_stream(other)
