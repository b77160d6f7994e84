"""Products under vmap equal their definition, in value and in every gradient, whatever is mapped and differentiated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import close
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.kernels import mapped_linear as K
from fgpt.kernels.linear import adapted_linear, base_linear
from fgpt.kernels.quantized_linear import dequantize, quantize_matrix

ROWS, INP, OUT, RANK, N = 5, 64, 16, 3, 4


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rng = fgpt.key(0)
    shapes = {"x": (N, ROWS, INP), "w": (OUT, INP), "bias": (OUT,), "a": (N, RANK, INP), "b": (N, OUT, RANK)}
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """These products are too small for the fast path otherwise."""
    monkeypatch.setattr(K, "MIN_PRODUCTS", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product with the base that the fast path computes."""
    seen: list[int] = []
    original = K.frozen_product

    def product(x: Tensor, w: Any, bias: Any) -> Tensor:
        seen.append(x[..., 0].numel())
        return original(x, w, bias)

    monkeypatch.setattr(K, "frozen_product", product)
    return seen


def loss(x: Tensor, a: Tensor, b: Tensor, w: Any, bias: Tensor | None) -> Tensor:
    y = adapted_linear(x, w, bias, a=a, b=b, row=None, scale=0.7, seed=None, p=0.0)
    return y.sin().sum()


def definition(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ w.T + 0.7 * (x @ a.T) @ b.T
    return (y if bias is None else y + bias).sin().sum()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("mapped", ["all", "x", "factors"])
def test_the_gradients_of_each_member(mapped: str, biased: bool, calls: list[int]):
    t = operands(torch.float64)
    bias = t["bias"] if biased else None
    in_dims = {"all": (0, 0, 0), "x": (0, None, None), "factors": (None, 0, 0)}[mapped]
    x, a, b = (t[name] if dim == 0 else t[name][0] for name, dim in zip("xab", in_dims, strict=True))
    got = vmap(grad(loss, (0, 1, 2)), in_dims=(*in_dims, None, None))(x, a, b, t["w"], bias)
    assert calls == [N * ROWS]  # one product for all members
    for i in range(N):
        own = [v if dim is None else v[i] for v, dim in zip((x, a, b), in_dims, strict=True)]
        for g, e in zip(got, grad(definition, (0, 1, 2))(*own, t["w"], bias), strict=True):
            close(g[i], e, 1e-9)


COMPOSITIONS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "vmap": lambda f: vmap(f),
    "grad(vmap)": lambda f: grad(lambda *xs: vmap(f)(*xs).sum(), (0, 1, 2)),
    "vmap(grad)": lambda f: vmap(grad(f, (0, 1, 2))),
    "vmap(vmap(grad))": lambda f: lambda *xs: vmap(vmap(grad(f, (0, 1, 2))))(*(x.unflatten(0, (2, 2)) for x in xs)),
    "vmap(grad(grad))": lambda f: vmap(grad(lambda *xs: grad(f)(*xs).square().sum(), (0, 1, 2))),
    "jvp(vmap(grad))": lambda f: lambda *xs: jvp(vmap(grad(f)), xs, tuple(torch.ones_like(x) for x in xs))[1],
}


@pytest.mark.parametrize("base", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("name", list(COMPOSITIONS))
def test_every_composition_equals_the_definition(name: str, base: Any):
    if base == "int8" and name in ("vmap(grad(grad))", "jvp(vmap(grad))"):
        pytest.skip("x is rounded to integers: its second derivatives are those of another function")
    t = operands()
    w: Any = t["w"] if base == "fp32" else quantize_matrix(t["w"], base)
    dense = t["w"] if base == "fp32" else dequantize(w)
    composed = COMPOSITIONS[name]
    got = composed(lambda x, a, b: loss(x, a, b, w, t["bias"]))(t["x"], t["a"], t["b"])
    expected = composed(lambda x, a, b: definition(x, a, b, dense, t["bias"]))(t["x"], t["a"], t["b"])
    rtol = 0.1 if base == "int8" else 0.0  # inputs are rounded to integers
    scale = max(float(e.abs().max()) for e in (expected if isinstance(expected, tuple) else (expected,)))
    for g, e in zip(_tuple(got), _tuple(expected), strict=True):
        close(g, e, (rtol + 1e-5) * scale + 2e-5)


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def test_a_backward_that_is_recorded_has_derivatives():
    """Plain autograd over vmap, twice."""
    t = operands(torch.float64)
    xs = [t[name].requires_grad_() for name in "xab"]

    def second(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        total = vmap(lambda x, a, b: f(x, a, b, t["w"], t["bias"]))(*xs).sum()
        first = torch.autograd.grad(total, xs, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in first), torch.zeros(())), xs)

    for g, e in zip(second(loss), second(definition), strict=True):
        close(g, e, 1e-9)


def test_a_weight_of_the_loss_is_differentiated_too():
    """A metagradient: the cotangents of the first backward are differentiated by plain autograd."""
    t = operands(torch.float64)
    weights = torch.rand(N, dtype=torch.float64, requires_grad=True)

    def meta(f: Callable[..., Tensor]) -> Tensor:
        def weighted(a: Tensor) -> Tensor:
            return (weights * vmap(lambda x, a, b: f(x, a, b, t["w"], None))(t["x"], a, t["b"])).sum()

        return torch.autograd.grad(grad(weighted)(t["a"]).square().sum(), weights)[0]

    close(meta(loss), meta(definition), 1e-9)


def test_what_has_a_gradient_or_is_mapped_in_the_base_takes_the_plain_way(calls: list[int]):
    t = operands()

    def trained(w: Tensor, x: Tensor) -> Tensor:
        return base_linear(x, w, None).sin().sum()

    ws = t["w"] + torch.arange(N)[:, None, None]
    got = vmap(grad(trained))(ws, t["x"])
    assert not calls
    for i in range(N):
        close(got[i], grad(lambda w, x: (x @ w.T).sin().sum())(ws[i], t["x"][i]), 1e-4)


def test_under_autocast_products_take_the_plain_way(calls: list[int]):
    t = operands()
    with torch.autocast("cpu", torch.bfloat16):
        y = vmap(lambda x, a, b: loss(x, a, b, t["w"], t["bias"]))(t["x"], t["a"], t["b"])
    assert not calls
    assert y.isfinite().all()


def test_the_reference_is_the_definition():
    t = operands(torch.float64)
    y = K.reference(t["x"], t["x"], t["w"], t["bias"], t["a"], t["b"], 0.7)
    for i in range(N):
        x = t["x"][i]
        close(y[i], x @ (t["w"] + 0.7 * t["b"][i] @ t["a"][i]).T + t["bias"], 1e-12)
