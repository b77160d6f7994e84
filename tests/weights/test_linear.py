"""`linear`, `embed` and products of a weight are those of its dense matrix, over every kind of weight."""

from typing import Any

import pytest
import torch
from builders import LargestTensor, close, tokens
from builders.adapters import assert_near, dense_by_definition, random_matrix, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fgpt
from fgpt.kernels.quantized_linear import RowwiseInt8
from fgpt.losses import linear_terms

OUT, IN = 7, 64


@settings(max_examples=60)
@given(
    random_weights("fp32", "nf4", "fp4", "blockwise8", "rotated nf4"),
    st.sampled_from([(), (1,), (2, 3)]),
    st.booleans(),
)
def test_linear_embed_and_products_are_dense(w: Any, batch: tuple[int, ...], biased: bool):
    x = torch.randn(*batch, IN, generator=fgpt.key(1))
    bias = torch.randn(OUT, generator=fgpt.key(2)) if biased else None
    exact = x.double() @ dense_by_definition(w).T
    assert_near(fgpt.dense(w), dense_by_definition(w), 1e-6)
    assert_near(fgpt.linear(x, w, bias), exact if bias is None else exact + bias.double())
    assert_near(torch.stack([y @ m.T for y, m in linear_terms(x, w)]).sum(0), exact)
    rows = tokens(OUT, *batch)
    assert_near(fgpt.embed(rows, w), dense_by_definition(w)[rows])


def float_parts(w: Any) -> list[Tensor]:
    """The tensors of `w` that have a gradient."""
    if not isinstance(w, fgpt.Adapted):
        return [w] if isinstance(w, Tensor) else []
    return [x for x in (w.a, w.b, w.row, w.col, w.mid) if x is not None] + float_parts(w.base)


def positive(w: Any) -> Any:
    """`w` with every number's magnitude: what is summed there says how far fp32 can be trusted."""
    if not isinstance(w, fgpt.Adapted):
        return dense_by_definition(w).detach().abs()
    *parts, mid = [None if x is None else x.detach().abs() for x in (w.a, w.b, w.row, w.col, w.mid)]
    return fgpt.Adapted(positive(w.base), *parts, mid=mid, scale=w.scale)


@settings(max_examples=100)
@given(random_weights("fp32", "nf4", "rotated nf4"), st.sampled_from([(), (1,), (2, 3)]), st.booleans())
def test_gradients_of_linear_are_those_of_dense(w: Any, batch: tuple[int, ...], biased: bool):
    """By plain autograd, where a product is written over if nobody else reads it."""
    x, u = torch.randn(*batch, IN, generator=fgpt.key(1)), torch.randn(*batch, OUT, generator=fgpt.key(3))
    bias = [torch.randn(OUT, generator=fgpt.key(2))] if biased else []

    def gradients(x: Tensor, w: Any, bias: list[Tensor], u: Tensor, fn: Any) -> tuple[Tensor, ...]:
        inputs = [t.requires_grad_() for t in (x, *bias, *float_parts(w))]
        return torch.autograd.grad(fn(x, w, *bias), inputs, u)

    def exact(x: Tensor, w: Any, *bias: Tensor) -> Tensor:
        return x.double() @ dense_by_definition(w).T + sum(bias)

    found, true = gradients(x, w, bias, u, fgpt.linear), gradients(x, w, bias, u.double(), exact)
    # and last, that of a matrix which `w` holds quantized
    sizes = gradients(x.detach().abs(), positive(w), bias, u.double().abs(), exact)
    for got, expected, size in zip(found, true, sizes[: len(true)], strict=True):
        close(got.double(), expected.double(), 1e-5 * size.max().item())


@pytest.mark.parametrize("base", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("row", [None, torch.ones(OUT)], ids=["LoRA", "DoRA"])
def test_an_adapted_product_is_one_tensor(base: str, row: Tensor | None):
    """The update is added, and the scale applied, where the product lies, which is as many as without."""
    x, w = torch.randn(3, 5, IN, generator=fgpt.key(1)), random_matrix(base, OUT, IN)
    a, b = torch.randn(2, IN).requires_grad_(), torch.randn(OUT, 2).requires_grad_()
    with LargestTensor() as bare:
        fgpt.linear(x.view(15, IN), w)
    with LargestTensor() as adapted:
        fgpt.linear(x, fgpt.Adapted(w, a, b, row))
    assert adapted.shapes.count((15, OUT)) == bare.shapes.count((15, OUT)) > 0
    assert (3, 5, OUT) not in adapted.shapes


def rounding(x: Tensor, w: Any) -> Tensor:
    """x dense(w)ᵀ, but that the frozen matrix sees each row of its input in 8 bits: in float64, once rounded."""
    if isinstance(w, RowwiseInt8):
        step = x.abs().amax(-1, keepdim=True) / 127
        return ((x / step).round().double() * step.double()) @ dense_by_definition(w).T
    x = x if w.col is None else x * w.col
    y = rounding(x, w.base)
    if w.a is not None:
        mid = torch.eye(len(w.a)) if w.mid is None else w.mid
        y = y + w.scale * x.double() @ w.a.double().T @ mid.double().T @ w.b.double().T
    return y if w.row is None else y * w.row.double()


@given(random_weights("int8"), st.sampled_from([(), (1,), (2, 3)]), st.booleans())
def test_over_whole_numbers_linear_is_dense_of_the_rounded_input(w: Any, batch: tuple[int, ...], biased: bool):
    x = torch.randn(*batch, IN, generator=fgpt.key(1))
    bias = torch.randn(OUT, generator=fgpt.key(2)) if biased else None
    expected, exact = rounding(x, w), x.double() @ dense_by_definition(w).T
    assert_near(fgpt.linear(x, w, bias), expected if bias is None else expected + bias.double())
    assert_near(
        torch.stack([y @ m.T for y, m in linear_terms(x, w)]).sum(0), exact
    )  # a head's products are not rounded
    rows = tokens(OUT, *batch)
    assert_near(fgpt.embed(rows, w), dense_by_definition(w)[rows])


@given(st.integers(0, 99), st.sampled_from([1e-3, 1.0, 1e3]), st.integers(0, 3))
def test_the_error_of_whole_numbers_has_its_bound(seed: int, size: float, outliers: int):
    """A number is at most half a step off, and a step is max|x| / 127 of its own row:

    |y_j - x·w_j| <= max|x| / 254 · ‖w_j‖₁
    """
    x = torch.randn(5, IN, generator=fgpt.key(seed)) * size
    x[:, :outliers] *= 50
    w = random_matrix("int8", OUT, IN, seed=seed)
    exact, bound = (
        x.double() @ dense_by_definition(w).T,
        x.abs().amax(-1, keepdim=True) / 254 * dense_by_definition(w).abs().sum(-1),
    )
    error = (fgpt.linear(x, w) - exact).abs()
    assert (error <= bound + 1e-6 * exact.abs().max()).all()
    assert error.max() > bound.min() / 100  # it is a rounded product that is bounded
