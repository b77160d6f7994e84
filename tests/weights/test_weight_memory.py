"""What the products of an adapted weight allocate: no second matrix."""

from typing import Any

import pytest
import torch
from builders import LargestTensor, with_noise
from builders.adapters import random_matrix
from torch import Tensor
from torch.func import grad

import fgpt
from fgpt.model import Linear
from fgpt.weights import row_norms

WIDE = 2048


@pytest.fixture(scope="module")
def wide() -> dict[str, Any]:
    return {kind: random_matrix(kind, WIDE, WIDE) for kind in ("fp32", "bf16", "nf4", "int8", "blockwise8")}


def adapter(method: str, w: Any) -> fgpt.Adapters:
    base = {"layer": Linear(w, torch.zeros(WIDE))}
    if method == "ia3":
        return with_noise(fgpt.ia3(base, "layer", "layer"))
    return with_noise((fgpt.dora if method == "dora" else fgpt.lora)(base, fgpt.key(0), 4, target="layer"))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8", "blockwise8"])
def test_row_norms_hold_no_second_matrix(wide: dict[str, Any], kind: str):
    lora: Any = adapter("lora", wide[kind])["layer"]
    with LargestTensor() as largest:
        fgpt.dora({"layer": Linear(wide[kind])}, fgpt.key(0), 4, target="layer")
        row_norms(wide[kind], lora.a, lora.b, lora.scale)
        row_norms(fgpt.Adapted(wide[kind], lora.a, lora.b), lora.a, lora.b, lora.scale)
    assert largest.numel <= (8 * WIDE if kind == "fp32" else WIDE * WIDE // 4)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_layer_costs_no_matrix(wide: dict[str, Any], method: str):
    """Adapting, forward and backward: nothing new beyond the rows and the adapter's own size."""
    base, adapters = {"layer": Linear(wide["fp32"], torch.ones(WIDE))}, adapter(method, wide["fp32"])
    x = torch.randn(3, WIDE, generator=fgpt.key(1))

    def f(adapters: Any) -> Tensor:
        layer = fgpt.adapt(base, adapters)["layer"]
        return fgpt.linear(x, layer.w, layer.b).square().sum()

    with LargestTensor() as largest:
        grad(f)(adapters)
        fgpt.adapt(base, adapters)
    assert WIDE < largest.numel <= 4 * WIDE


def test_a_stack_of_adapters_on_a_quantized_layer_expands_its_base_alone(wide: dict[str, Any]):
    adapted: Any = {"layer": Linear(wide["nf4"])}
    for method in ("lora", "dora", "ia3"):
        adapted = fgpt.adapt(adapted, adapter(method, wide["nf4"]))
    sizes = []
    for w in (wide["nf4"], adapted["layer"].w):
        with LargestTensor() as largest:
            fgpt.linear(torch.randn(3, WIDE, generator=fgpt.key(1)), w)
        sizes.append(largest.shapes)
    large = [{s for s in shapes if torch.Size(s).numel() >= WIDE * 64} for shapes in sizes]
    assert large[0] == large[1]
