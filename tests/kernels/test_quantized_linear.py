"""Products with a quantized matrix, under every transform."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import close, stack_trees
from builders.quantized import FORMATS, normal_matrix
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

import fgpt
from fgpt.kernels import hadamard
from fgpt.kernels import quantized_linear as kernel
from fgpt.kernels.quantized_linear import (
    Rotated,
    RowwiseInt8,
    fake_quantize,
    quantize_matrix,
    quantized_linear,
    reference,
)

pytestmark = pytest.mark.usefixtures("exact_derivatives")


def dequantized_product(x: Tensor, w: Any) -> Tensor:
    """The meaning of a product: x Wᵀ, with x in 8 bits if W is int8, differentiated as if it were not."""
    if isinstance(w, Rotated):
        return dequantized_product(hadamard.reference(x, w.block), w.base)
    return F.linear(fake_quantize(x) if isinstance(w, RowwiseInt8) else x, reference(w).to(x.dtype))


@pytest.fixture(params=[*FORMATS, "rotated int8", "rotated nf4"])
def w(request: pytest.FixtureRequest) -> Any:
    if request.param.startswith("rotated "):
        return Rotated(quantize_matrix(normal_matrix(5, 64), request.param.removeprefix("rotated ")), block=32)
    return quantize_matrix(normal_matrix(5, 64), request.param)


@pytest.mark.parametrize("size", [(64,), (0, 64), (1, 64), (3, 64), (2, 3, 64)], ids=str)
def test_a_product_is_one_with_the_expanded_matrix(w: Any, size: tuple[int, ...]):
    x = normal_matrix(*size, seed=1)
    close(quantized_linear(x, w), dequantized_product(x, w), 1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        y = quantized_linear(x.to(dtype), w)
        assert y.dtype == dtype
        close(y.float(), dequantized_product(x.to(dtype), w).float(), 0.1, 0.02)


@pytest.mark.parametrize("to", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_4bit_kernel_gets_what_it_expects(to: Any, double_quant: bool, monkeypatch: pytest.MonkeyPatch):
    """On a CPU its operator dequantizes: arguments are right, and so are derivatives of a product that uses it."""
    w: Any = quantize_matrix(normal_matrix(40, 1024), to, double_quant)
    x = normal_matrix(2, 3, 1024, seed=1)
    expected = dequantized_product(x, w)
    close(kernel.multiply_4bit(x, w), expected, 1e-4)
    assert not kernel._has_4bit_kernel(x, w)
    used: list[int] = []
    monkeypatch.setattr(kernel, "_has_4bit_kernel", lambda x, w: not used.append(len(x)))
    close(quantized_linear(x, w), expected, 1e-4)
    assert used
    g = normal_matrix(2, 3, 40, seed=2)
    close(vjp(lambda x: quantized_linear(x, w), x)[1](g)[0], g @ reference(w), 1e-4)
    close(vmap(lambda x: quantized_linear(x, w))(x), expected, 1e-4)


def test_rounding_is_half_a_step_and_differentiates_as_nothing():
    x = normal_matrix(4, 64) * torch.tensor([[1.0], [1e-3], [1e3], [0.0]])
    step = x.abs().amax(-1, keepdim=True) / 127
    got = fake_quantize(x)
    assert ((got - x).abs() <= step * 0.50001).all()
    assert (got - x).abs().amax(-1)[:3].gt(0.4 * step[:3, 0]).all()
    whole = got[:3] / step[:3]
    close(whole, whole.round(), 1e-3)
    close(grad(lambda x: (fake_quantize(x) * normal_matrix(4, 64)).sum())(x), normal_matrix(4, 64), 0)
    close(jvp(fake_quantize, (x,), (torch.ones_like(x),))[1], torch.ones_like(x), 0)


def test_products_under_every_transform(w: Any):
    """Against torch's own product with the expanded matrix: values and all derivatives."""
    x, t = normal_matrix(3, 64, seed=1), normal_matrix(3, 64, seed=2)

    def of(multiply: Callable[[Tensor, Any], Tensor]) -> dict[str, Any]:
        def f(x: Tensor) -> Tensor:
            return (multiply(x, w) / 8).sin().square().sum()

        return {
            "value": f(x),
            "grad": grad(f)(x),
            "vmap": vmap(lambda x: multiply(x, w))(x),
            "vmap over columns": vmap(lambda x: multiply(x, w), in_dims=1)(x.T),
            "vmap of vmap": vmap(vmap(lambda x: multiply(x, w)))(torch.stack([x, t])),
            "vmap(grad)": vmap(grad(f))(x),
            "grad of vmap": grad(lambda x: vmap(f)(x).sum())(x),
            "jvp": jvp(f, (x,), (t,)),
            "vjp": vjp(lambda x: multiply(x, w), x)[1](normal_matrix(3, 5, seed=3)),
            "jvp(grad)": jvp(grad(f), (x,), (t,)),
            "grad(grad)": grad(lambda x: (grad(f)(x) * t).sum())(x),
            "vmap(jvp(grad))": vmap(lambda x, t: jvp(grad(f), (x,), (t,))[1])(x, t),
            "third": grad(lambda x: jvp(grad(f), (x,), (t,))[1].square().sum())(x),
            "hessian": hessian(f)(x[0]),
            "jacobian": jacrev(lambda x: multiply(x, w))(x[0]),
        }

    got, expected = of(quantized_linear), of(dequantized_product)
    for name in expected:
        a, b = (x[name] if isinstance(x[name], tuple) else (x[name],) for x in (got, expected))
        assert max(y.abs().max() for y in b) > 1e-3, name
        for y, z in zip(a, b, strict=True):
            torch.testing.assert_close(y, z, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_autograds_double_backward(w: Any):
    x, t = normal_matrix(3, 64, seed=1).requires_grad_(), normal_matrix(3, 64, seed=2)

    def twice(multiply: Callable[[Tensor, Any], Tensor]) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad((multiply(x, w) / 8).sin().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * t).sum(), x)
        return first.detach(), second

    for got, expected in zip(twice(quantized_linear), twice(dequantized_product), strict=True):
        close(got, expected, 2e-5, 1e-4)
        assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_derivatives_in_bf16_round_what_they_take_and_give_and_no_weight(monkeypatch: pytest.MonkeyPatch, dtype: Any):
    """Over whole numbers in fp32 or bf16, forward and backward; the value, and other dtypes, stay as they are."""
    w = quantize_matrix(normal_matrix(96, 128) * torch.logspace(-2, 2, 96)[:, None], "int8")
    x, t, g = (
        normal_matrix(5, 128, seed=1).to(dtype),
        normal_matrix(5, 128, seed=2).to(dtype),
        normal_matrix(5, 96, seed=3).to(dtype),
    )
    row, codes = w.absmax.double() / 127, w.codes.double()

    def short(y: Tensor) -> Tensor:
        return y.to(torch.bfloat16).double()

    def value_and_derivatives() -> tuple[Tensor, Tensor, Tensor]:
        (y, tangent), (back,) = (
            jvp(lambda x: quantized_linear(x, w), (x,), (t,)),
            vjp(lambda x: quantized_linear(x, w), x)[1](g),
        )
        assert y.dtype == tangent.dtype == back.dtype == dtype
        return y, tangent, back

    y, *exact = value_and_derivatives()
    monkeypatch.setattr(kernel, "HAS_BF16_MATMUL", True)
    same, tangent, back = value_and_derivatives()
    assert torch.equal(same, y)
    if dtype in (torch.float32, torch.bfloat16):
        # the product is rounded to 8 bits, and again where scaling it follows
        for got, want in ((tangent, short(t) @ codes.T * row), (back, short(g.float() * row.float()) @ codes)):
            far = (1.02 + (dtype == torch.bfloat16)) * want.abs() / 2**8 + 1e-6 * want.abs().max()
            assert ((got.double() - want).abs() <= far).all()
            assert (short(got) - want).abs().max() > 1e-4 * want.abs().max()
    else:
        assert torch.equal(tangent, exact[0])
        assert torch.equal(back, exact[1])


def test_mapping_over_quantized_weights_is_refused():
    many = stack_trees([quantize_matrix(normal_matrix(5, 64, seed=i), "nf4") for i in range(3)])
    for axes in ((None, 0), (0, 0)):
        with pytest.raises(fgpt.InputError, match="cannot vmap over quantized weights: map over the adapters"):
            vmap(quantized_linear, in_dims=axes)(normal_matrix(3, 64), many)
