"""Several layers of one input are each layer by itself, and the products with their A's are one."""

from typing import Any
from unittest import mock

import pytest
import torch
from builders import close
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import fgpt
from fgpt.kernels import hadamard, quantized_linear
from fgpt.kernels.quantized_linear import Rotated, quantize_matrix
from fgpt.weights import Adapted, Weight, linear, linear_group


def low_rank(out: int, rank: int, base: Any = None, **others: Any) -> Adapted:
    rng = fgpt.key(out + rank)
    w = torch.randn(out, 8, generator=rng) if base is None else base
    return Adapted(
        w, torch.randn(rank, 8, generator=rng), torch.randn(out, rank, generator=rng), scale=0.5 * rank, **others
    )


LAYER = fgpt.model.Linear(torch.randn(4, 8, generator=fgpt.key(3)))
SAME, OTHER = torch.randn(4, 8, generator=fgpt.key(4)), torch.randn(5, 8, generator=fgpt.key(5))
ROTATED = [Rotated(quantize_matrix(w, "int8"), block) for w, block in ((SAME, 8), (OTHER, 8), (SAME, 4))]
INT8 = fgpt.quantize({"layer": LAYER}, "int8", target="layer")["layer"].w

GROUPS: dict[str, list[Weight]] = {
    "ranks": [low_rank(4, 2), low_rank(6, 1), low_rank(4, 3)],
    "one is plain": [low_rank(4, 2), torch.randn(5, 8, generator=fgpt.key(9)), low_rank(3, 2)],
    "one alone": [low_rank(4, 2), torch.randn(5, 8, generator=fgpt.key(9))],
    "scaled rows": [low_rank(4, 2), low_rank(4, 3), low_rank(4, 1, row=torch.tensor([1.0, 2.0, 3.0, 4.0]))],
    "scaled columns": [low_rank(4, 2), low_rank(4, 3), low_rank(4, 1, col=torch.arange(8.0))],
    "dropout": [low_rank(4, 2), low_rank(4, 3), low_rank(4, 1, seed=torch.tensor(3), dropout=0.5)],
    "with a matrix between": [low_rank(4, 2, mid=torch.tensor([[1.0, 2.0], [3.0, 5.0]])), low_rank(4, 3)],
    "stacked": [low_rank(4, 2), low_rank(4, 3), low_rank(4, 1, base=low_rank(4, 2))],
    "rotated": [low_rank(4, 2, base=ROTATED[0]), ROTATED[1]],
    "rotated, and plain": [low_rank(4, 2, base=ROTATED[0]), low_rank(4, 2), low_rank(5, 1, base=ROTATED[1])],
    "rotated by other blocks": [ROTATED[0], low_rank(4, 2, base=ROTATED[2])],
    "quantized": [low_rank(4, 2), low_rank(4, 3, base=INT8)],
}


@pytest.mark.parametrize("name", GROUPS)
def test_each_is_its_layer(name: str, monkeypatch: pytest.MonkeyPatch):
    """Values, gradients, mapped and in forward mode."""
    monkeypatch.setattr(quantized_linear, "HAS_BF16_MATMUL", False)  # or a sum would be rounded, or its terms
    weights = GROUPS[name]
    biases = [torch.arange(float(len(fgpt.dense(w)))) if i % 2 else None for i, w in enumerate(weights)]
    x, tangent = torch.randn(2, 3, 8, generator=fgpt.key(0)), torch.randn(2, 3, 8, generator=fgpt.key(1))

    def group(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear_group(x, list(zip(weights, biases, strict=True))))

    def each(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x, w, b) for w, b in zip(weights, biases, strict=True))

    def total(f: Any, x: Tensor) -> Tensor:
        return torch.stack([y.sin().sum() for y in f(x)]).sum()

    close(group(x), each(x), 1e-5)
    close(vmap(group)(x), vmap(each)(x), 1e-5)
    close(grad(lambda x: total(group, x))(x), grad(lambda x: total(each, x))(x), 1e-5)
    close(jvp(group, (x,), (tangent,)), jvp(each, (x,), (tangent,)), 1e-5)


def test_the_gradients_of_the_adapters():
    params = fgpt.init(fgpt.Config(1, 2, 16, 24, 31, 40), fgpt.key(0))
    adapters = fgpt.lora(params, fgpt.key(1), 2, target=r".*\.(q|k|v)")
    x = torch.randn(5, 16, generator=fgpt.key(2))

    def total(a: Any, joined: bool) -> Tensor:
        p = fgpt.adapt(params, a).blocks[0].attn
        layers = [(y.w, y.b) for y in (p.q, p.k, p.v)]
        outputs = linear_group(x, layers) if joined else [linear(x, w, b) for w, b in layers]
        return torch.stack([y.sin().sum() for y in outputs]).sum()

    close(grad(total)(adapters, True), grad(total)(adapters, False), 1e-5)


def test_one_product_for_all_a():
    weights = [(w, None) for w in GROUPS["ranks"]]
    x = torch.randn(3, 8)
    with FlopCounterMode(display=False) as joined:
        linear_group(x, weights)
    with FlopCounterMode(display=False) as apart:
        for w, bias in weights:
            linear(x, w, bias)
    assert joined.get_total_flops() == apart.get_total_flops()
    with torch.profiler.profile() as profile:
        linear_group(x, weights)
    products = [e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_")]
    assert sum(products) == 3 + 1 + 3  # with each W, with all A's, with each B


def test_one_rotation_for_all():
    layers = [(w, None) for w in (ROTATED[0], ROTATED[1], low_rank(4, 2, base=ROTATED[0]))]
    with mock.patch.object(hadamard, "_matrix", wraps=hadamard._matrix) as rotations:
        linear_group(torch.randn(3, 8), layers)
        assert rotations.call_count == 1
        for w, bias in layers:
            linear(torch.randn(3, 8), w, bias)
        assert rotations.call_count == 4
