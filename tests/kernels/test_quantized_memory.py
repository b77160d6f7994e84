"""What products with a quantized matrix keep in memory."""

from typing import Any

import pytest
import torch
from builders import LargestTensor
from builders.quantized import FORMATS, normal_matrix
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fgpt
from fgpt.kernels.quantized_linear import (
    quantize_matrix,
    quantized_linear,
)

pytestmark = pytest.mark.usefixtures("exact_derivatives")


class Expansions(TorchDispatchMode):
    """Every storage of floats as large as a matrix, and whether anything still holds it."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.storages = numel, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel() >= self.numel:
            self.storages.append(StorageWeakRef(out.untyped_storage()))
        return out

    def num_alive(self) -> int:
        return sum(not ref.expired() for ref in self.storages)


def test_a_product_makes_its_matrix_and_nothing_as_large_beside_it():
    w = quantize_matrix(normal_matrix(256, 1024), "nf4")
    with LargestTensor() as largest:
        quantized_linear(normal_matrix(2, 1024), w)
    assert sorted(s for s in largest.shapes if torch.Size(s).numel() > 256 * 1024 // 2) == [(256, 1024)]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_no_expanded_matrix_waits_for_the_backward(kind: Any, adapted: bool):
    """Whether saved by autograd or kept by hand."""
    out, inp = 96, 128
    w: Any = quantize_matrix(normal_matrix(out, inp), kind)
    x, saved = normal_matrix(3, inp, seed=1).requires_grad_(), []
    if adapted:
        a, b = normal_matrix(2, inp, seed=2).requires_grad_(), normal_matrix(out, 2, seed=3).requires_grad_()
        w = fgpt.Adapted(w, a, b, torch.ones(out, requires_grad=True), torch.ones(inp, requires_grad=True))

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with Expansions(out * inp) as expansions, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = fgpt.linear(x, w)
        in_forward = len(expansions.storages)
        assert expansions.num_alive() == 0
        assert not [t for t in saved if t.is_floating_point() and t.numel() >= out * inp]
        y.square().sum().backward()
        assert len(expansions.storages) > max(in_forward, 0 if kind == "int8" else 1)  # expanded anew, and let go
        assert expansions.num_alive() == 0
    assert x.grad is not None


def test_a_gpu_takes_a_matrix_whole():
    """The meta device stands for one: a kernel for each piece would take longer to start than to run."""
    calls: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    w = normal_matrix(2048, 1024)
    counts = []
    for x in (w, w.to("meta")):
        calls.clear()
        with Calls():
            quantize_matrix(x, "nf4")
        counts.append(calls.count("quantize_4bit"))
    assert counts == [32, 1]
