"""A decode step as a CUDA graph: the kernels of one step are recorded once, and started by one call from then on.

A decode step starts hundreds of kernels that run for microseconds each, so that the CPU which starts them is the limit.
A `StaticKVCache` is made for a graph: every shape is fixed, and position and slot are tensors on the device, which the
recorded kernels advance themselves.

    step = GraphedStep(static_cache.decode_step)
    logits = step(params, tokens, cache)        the same as decode_step(params, tokens, cache)

Source: the pytorch documentation, "CUDA semantics", section CUDA Graphs.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.generation.static_cache import StaticKVCache
from fgpt.model import GPT

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""From a function to a replay of its kernels: it computes the same again, from the tensors' values of that time."""


def record_cuda_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The kernels of `run`, which it does not execute yet. Every replay writes its result into the same tensor."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class GraphedStep:
    """A decode step, recorded for one cache at a time. The first step of a cache runs eagerly, as kernels must be
    loaded and compiled before a recording; the second is recorded. If it cannot be, a warning says so, and all steps
    run eagerly.

    Args:
        step: `static_cache.decode_step`, or what it is compiled to.
        record: Makes a replay of a function.
    """

    def __init__(self, step: Callable[..., Tensor], record: Record = record_cuda_graph) -> None:
        self._step, self._record = step, record
        self._cache: StaticKVCache | None = None
        self._tokens: Tensor | None = None
        self._replay: Callable[[], Tensor] | None = None

    def __call__(
        self, params: GPT, tokens: Int[Tensor, "batch"], cache: StaticKVCache, adapters: Adapters | None = None
    ) -> Float[Tensor, "batch vocab"]:
        """As `static_cache.decode_step`. `params` and `adapters` stay the same for a cache. The next call overwrites
        the result.
        """
        if self._tokens is None or cache is not self._cache:
            self._cache, self._tokens, self._replay = cache, tokens.clone(), None
            with _side_stream(tokens.device):
                return self._step(params, self._tokens, cache, adapters)
        fixed = self._tokens.copy_(tokens)
        if self._replay is None:
            self._replay = self._try_recording(lambda: self._step(params, fixed, cache, adapters), tokens.device)
        return self._replay()

    def _try_recording(self, run: Callable[[], Tensor], at: torch.device) -> Callable[[], Tensor]:
        try:
            with torch.cuda.device(at) if at.type == "cuda" else contextlib.nullcontext():
                return self._record(run)
        except RuntimeError as err:
            reason = str(err).strip().partition("\n")[0]
            warnings.warn(f"decoding without a CUDA graph, as the step cannot be recorded: {reason}", stacklevel=4)
            return run


@contextlib.contextmanager
def _side_stream(at: torch.device) -> Iterator[None]:
    """Another stream than the current one, as libraries must be warm for the stream of a recording. None on a CPU."""
    if at.type != "cuda":
        yield
        return
    current, other = torch.cuda.current_stream(at), torch.cuda.Stream(at)
    other.wait_stream(current)
    with torch.cuda.stream(other):
        yield
    current.wait_stream(other)
