"""An imitation of a CUDA graph that runs on a CPU."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fgpt.kernels import fused_attention as fused


def tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for y in x:
            yield from tensors(y)


class RecordOperators(TorchDispatchMode):
    """Every operator with its operands: tensors by their address, all that Python computed as the value of that time,
    as a CUDA graph has it. What an operator changes in place is restored, as a recording executes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        fixed_args, fixed_kwargs = pytree.tree_map_only(Tensor, torch.detach, (args, kwargs))
        for x, argument in zip(fixed_args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(y, y.clone()) for y in tensors(x)]
        result = func(*args, **kwargs)
        # Other tensors over the same memory: a buffer for results of several sizes has its last size in the end.
        fixed_result = pytree.tree_map_only(Tensor, torch.detach, result)
        self.calls.append((func, fixed_args, fixed_kwargs, fixed_result))
        return result

    def restore(self) -> None:
        for x, before in reversed(self.before):
            x.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def imitate(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a graph of it computes it again, as `record_cuda_graph` returns it."""
    recorder = RecordOperators()
    # On CUDA the attention to documents is one kernel that reads their bounds; here an operator stands for it.
    kernels = {"_cpu_documents": fused._documents, "_cpu_documents_backward": fused._documents_backward}
    try:
        with recorder, mock.patch.multiple(fused, **kernels):
            result = run()
    finally:
        recorder.restore()

    def replay() -> Any:
        recorder.replay()
        return result

    return replay
