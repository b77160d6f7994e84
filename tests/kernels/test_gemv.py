"""A product of a few rows: the same as torch's, by oneDNN, where nothing is differentiated."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.kernels import gemv, onednn_linear
from fgpt.kernels.quantized_linear import quantize_matrix

needs_onednn = pytest.mark.skipif(not onednn_linear.HAS_ONEDNN, reason="this CPU has no oneDNN product")


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=fgpt.key(seed))


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "MIN_ELEMENTS", 0)


@needs_onednn
@torch.no_grad()
@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (64,), (0,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "every other"])
def test_products_of_few_rows(batch: tuple[int, ...], bias: bool, layout: str):
    """Within the bound of any order of summing, n ε (|x| |W|ᵀ + |b|), for any strides."""
    x, w, b = normal(*batch, 40), normal(50, 40, seed=1), normal(50, seed=2) if bias else None
    if layout == "columns":
        x, w = x.mT.contiguous().mT if x.ndim > 1 else x, w.T.contiguous().T
    elif layout == "every other":
        x, w = x.repeat_interleave(2, -1)[..., ::2], w.repeat_interleave(2, 1)[:, ::2]
        b = None if b is None else b.repeat_interleave(2)[::2]
    assert gemv.use_gemv(x, w) == onednn_linear.has_onednn_order(w)
    got = gemv.dense_linear(x, w, b)
    assert got.dtype == torch.float32
    assert got.shape == (*batch, 50)
    wide_x, wide_w = x.double().numpy().astype(np.longdouble), w.double().numpy().astype(np.longdouble)
    shift = np.zeros(50) if b is None else b.double().numpy()
    error = np.abs(got.double().numpy() - (wide_x @ wide_w.T + shift))
    assert (error <= 42 * torch.finfo(torch.float32).eps * (np.abs(wide_x) @ np.abs(wide_w).T + np.abs(shift))).all()


@needs_onednn
@pytest.mark.usefixtures("any_size")
def test_where_it_is_used():
    """On few rows in fp32, where no gradient is recorded and no transform surrounds the call."""
    w = torch.ones(6, 4)
    seen: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        seen.append(gemv.use_gemv(x, w))
        return x.sum()

    with torch.no_grad():
        ask(torch.ones(64, 4))
        ask(torch.ones(65, 4))
        ask(torch.ones(2, 4, dtype=torch.bfloat16))
        ask(torch.ones(2, 4, dtype=torch.float64))
        ask(torch.ones(2, 4, device="meta"))
        vmap(ask)(torch.ones(3, 2, 4))
        jvp(ask, (torch.ones(2, 4),), (torch.ones(2, 4),))
        grad(ask)(torch.ones(2, 4))
    ask(torch.ones(2, 4))
    assert seen == [True] + 8 * [False]


@needs_onednn
@torch.no_grad()
def test_small_matrices_are_torchs():
    assert not gemv.use_gemv(torch.ones(1, 8), torch.ones(8, 8))
    assert gemv.use_gemv(torch.ones(1, 512), torch.ones(512, 512))


@needs_onednn
@torch.no_grad()
@pytest.mark.usefixtures("any_size")
def test_a_layer_uses_it(monkeypatch: pytest.MonkeyPatch):
    """Through `linear`, adapted and quantized weights included."""
    calls: list[torch.Size] = []
    product = gemv.gemv

    def record(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(w.shape)
        return product(x, w, bias)

    monkeypatch.setattr(gemv, "gemv", record)
    x, w = normal(2, 64), normal(8, 64, seed=1)
    fgpt.linear(x, w)
    fgpt.linear(x, fgpt.Adapted(w, normal(2, 64, seed=2), normal(8, 2, seed=3)))
    fgpt.linear(x, quantize_matrix(w, "nf4"))
    assert calls == [(8, 64)] * 3
