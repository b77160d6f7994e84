"""Products with scaled rows, over plain and quantized matrices."""

from typing import Any

import pytest
import torch
from builders import LargestTensor, close
from torch import Tensor
from torch.func import vmap

import fgpt
from fgpt.kernels.dropout import dropout_mask
from fgpt.kernels.quantized_linear import dequantize, quantize_matrix


def with_scaled_rows(w: Any, row: Tensor, *ab: Tensor, drop: float = 0.0) -> fgpt.Adapted:
    """With s = 3, and dropout of A's input by a seed of 5."""
    a, b = ab or (None, None)
    return fgpt.Adapted(w, a, b, row, seed=torch.tensor(5) if drop else None, scale=3.0, dropout=drop)


@pytest.mark.parametrize("least", [0.5, 0.0], ids=["far from 0", "near 0"])
@pytest.mark.parametrize(
    "needs", [(1, 0, 1, 1), (1, 0, 1, 0), (1, 1, 0, 0), (0, 0, 1, 0), (0, 1, 0, 1), (1, 0, 1, None), (0, 0, 1, None)]
)
@pytest.mark.parametrize(("rank", "drop"), [(None, 0.0), (2, 0.0), (2, 0.5)])
def test_scaled_components(needs: tuple[Any, ...], least: float, rank: int | None, drop: float):
    """By hand, and by finite differences, twice, of x, W, the scale and the bias, also where a component of the scale
    is 0; in one tensor of the width of y each way, and far from 0 in one of x's width backward; near 0 the sum is kept.
    """
    sizes = [(6, 4), (5, 4), (5,), (5,), *([(rank, 4), (5, rank)] if rank else [])]
    inputs: list[Any] = [torch.rand(size, dtype=torch.float64, generator=fgpt.key(i)) for i, size in enumerate(sizes)]
    inputs[2] += least
    if not least:
        inputs[2][3] = 0.0
    needs = (*needs, 1, 1)[: len(inputs)]
    inputs = [x if need is None else x.requires_grad_(bool(need)) for x, need in zip(inputs, needs, strict=True)]
    inputs[3] = None if needs[3] is None else inputs[3]

    def fn(x: Tensor, w: Tensor, row: Tensor, bias: Tensor | None, *ab: Tensor) -> Tensor:
        return fgpt.linear(x, with_scaled_rows(w, row, *ab, drop=drop), bias)

    x, w, row, bias, *ab = inputs
    y = x @ w.T
    if ab:
        keep = dropout_mask(torch.tensor(5), 6, 4, drop) / (1 - drop) if drop else 1.0
        y = y + 3 * ((x * keep) @ ab[0].T) @ ab[1].T
    expected = row * y if bias is None else row * y + bias
    close(fn(*inputs), expected, 1e-14)
    close(vmap(lambda x: fn(x, *inputs[1:]))(torch.stack([x, x])), torch.stack([expected, expected]), 1e-14)
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)
    with LargestTensor() as forward:
        out = fn(*inputs)
    with LargestTensor() as backward:
        out.backward(torch.ones_like(expected))
    assert forward.shapes.count(out.shape) == (1 if least else 2)
    assert backward.shapes.count(out.shape) <= 2  # one of them the ones
    assert drop or not least or backward.shapes.count(x.shape) == needs[0]


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_scaled_over_quantized(to: Any):
    """The value and the gradients of the same over the expanded matrix; int8's within the rounding of x, which the
    gradients do not see.
    """
    x, w, a, b, g = (
        torch.randn(size, generator=fgpt.key(i)) for i, size in enumerate([(96, 64), (5, 64), (2, 64), (5, 2), (96, 5)])
    )
    row, bias, q = torch.rand(5) + 0.5, torch.rand(5), quantize_matrix(w, to)
    trained = [t.requires_grad_() for t in (x, row, bias, a, b)]
    found, true = (fgpt.linear(x, with_scaled_rows(m, row, a, b), bias) for m in (q, dequantize(q)))
    grads = [torch.autograd.grad(y, trained, g) for y in (found, true)]
    for u, v in zip((found, *grads[0]), (true, *grads[1]), strict=True):
        assert (u - v).norm() / v.norm() < (1e-5 if to == "nf4" else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("least", [1.0, 0.0])
def test_the_gradient_of_a_scale_is_summed_in_fp32(dtype: torch.dtype, least: float):
    """Within rounding of the same in fp64, over 4,096 rows, with a bias as large as what it is added to, and where y'
    says nothing of y because the scale is 0.
    """
    x, w, a, b, g = (
        torch.randn(size, generator=fgpt.key(i)).to(dtype)
        for i, size in enumerate([(4096, 4), (8, 4), (2, 4), (8, 2), (4096, 8)])
    )
    row, bias = torch.linspace(least, least + 1, 8).to(dtype), torch.ones(8, dtype=dtype)

    found = torch.autograd.grad(fgpt.linear(x, with_scaled_rows(w, row.requires_grad_(), a, b), bias), row, g)[0]
    true = ((x.double() @ (w.double() + 3 * b.double() @ a.double()).T) * g.double()).sum(0)
    off = (found - true).norm() / true.norm()
    assert off < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("rows", [0, 1])
def test_scaled_rows_may_be_few_or_none(rows: int):
    sizes = [(rows, 4), (5, 4), (5,), (5,), (2, 4), (5, 2)]
    x, w, row, bias, a, b = (torch.rand(size, dtype=torch.float64, generator=fgpt.key(0)) + 0.5 for size in sizes)
    inputs = [t.requires_grad_() for t in (x, row, bias, a, b)]
    found = torch.autograd.grad(fgpt.linear(x, with_scaled_rows(w, row, a, b), bias).sum(), inputs)
    true = torch.autograd.grad((row * (x @ (w + 3 * b @ a).T) + bias).sum(), inputs)
    close(found, true, 1e-12)
