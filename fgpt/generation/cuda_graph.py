"""A decode step as a CUDA graph: the kernels of one step are recorded once, and started by one call from then on.

A decode step starts hundreds of kernels that run for microseconds each, so that the CPU which starts them is the limit.
A `StaticKVCache` is made for a graph: every shape is fixed, and position and slot are tensors on the device, which the
recorded kernels advance themselves.

    step = GraphedStep(static_cache.decode_step)
    logits = step(params, tokens, cache)        the same as decode_step(params, tokens, cache)
"""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.generation.static_cache import StaticKVCache
from fgpt.kernels.cuda_graphs import Record, record_cuda_graph, side_stream, try_recording
from fgpt.model import GPT


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
            with side_stream(tokens.device):
                return self._step(params, self._tokens, cache, adapters)
        fixed = self._tokens.copy_(tokens)
        if self._replay is None:

            def run() -> Tensor:
                return self._step(params, fixed, cache, adapters)

            self._replay = try_recording(self._record, run, at=tokens.device, name="decoding") or run
        return self._replay()
