"""Products with Hessians and Gauss-Newton matrices equal explicit ones, by plain autograd in float64; over any base."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import close, tiny, tokens, with_noise
from builders.transforms import dot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

import fgpt
from fgpt.losses import at_loss, loss_hidden
from fgpt.transforms.curvature import (
    ggn_operator,
    ggnvp,
    hessian,
    hessian_operator,
    hvp,
    to_matrix,
)
from fgpt.tree import astype, ravel, tree_leaves, tree_map

TEXT = tokens(31, 2, 7)
BATCH = fgpt.Batch(
    TEXT[:, :-1], TEXT[:, 1:], torch.rand(2, 6, generator=fgpt.key(1)), loss_positions=torch.arange(1, 12)
)
BASE = astype(tree_map(lambda x: 0.5 * x, tiny(n_layer=1)), torch.float64)
ADAPTERS: Any = with_noise(
    astype(fgpt.lora(BASE, fgpt.key(0), 1, target=r".*\.(q|down)"), torch.float64)
    | fgpt.trainable_leaves(BASE, "ln_f.b"),
    0.2,
)


def loss(adapters: Any, base: Any = BASE) -> Tensor:
    return fgpt.loss(fgpt.adapt(base, adapters), BATCH)


def logits(adapters: Any, base: Any = BASE) -> Tensor:
    params = fgpt.adapt(base, adapters)
    return fgpt.logits(params, loss_hidden(params, BATCH))


def output_loss(z: Tensor) -> Tensor:
    weights = at_loss(BATCH.weights, BATCH).to(z.dtype)
    return (weights * F.cross_entropy(z, at_loss(BATCH.targets, BATCH), reduction="none")).sum() / weights.sum()


def directions(like: Any, seed: int = 0) -> Any:
    return with_noise(tree_map(torch.zeros_like, like), 1.0, seed)


def relative(x: Any, y: Any) -> float:
    """‖x - y‖ / ‖y‖ over all leaves."""
    a, b = ravel(x)[0].double(), ravel(y)[0].double()
    return float((a - b).norm() / b.norm())


def recorded_grad(fn: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf of plain autograd, and the gradient there, recorded for a second derivative."""
    point = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fn(point), point, create_graph=True)
    return point, gradient


def explicit_hessian(fn: Callable[[Any], Tensor], at: Any) -> Tensor:
    vector, unravel = ravel(at)
    point, gradient = recorded_grad(lambda x: fn(unravel(x)), vector)
    return torch.stack([torch.autograd.grad(g, point, retain_graph=True)[0] for g in gradient])


def explicit_jacobian(fn: Callable[[Any], Tensor], at: Any) -> Tensor:
    vector, unravel = ravel(at)
    point = vector.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(z, point, retain_graph=True)[0] for z in fn(unravel(point)).flatten()])


def test_the_hessian_is_that_of_plain_autograd():
    expected = explicit_hessian(loss, ADAPTERS)
    assert len(expected) == 16 * 2 + 40 + 16 + 16
    close(hessian(loss, ADAPTERS, chunk_size=7), expected, 1e-12)
    assert float(expected.abs().max()) > 1e-2
    v = directions(ADAPTERS)
    for product in (hvp(loss, ADAPTERS, v), hessian_operator(loss, ADAPTERS)(v)):
        close(ravel(product)[0], expected @ ravel(v)[0], 1e-12)


def test_a_product_is_the_difference_of_gradients():
    v, h = directions(ADAPTERS), 1e-4
    ends = [grad(loss)(tree_map(lambda x, d, s=s: x + s * h * d, ADAPTERS, v)) for s in (1, -1)]
    close(hvp(loss, ADAPTERS, v), tree_map(lambda a, b: (a - b) / (2 * h), *ends), 1e-6)


def explicit_ggn() -> Tensor:
    """Jᵀ H J with H written out: w_i (diag(p_i) - p_i p_iᵀ), and 0 between positions."""
    jacobian = explicit_jacobian(logits, ADAPTERS).view(11, 31, -1)
    p = logits(ADAPTERS).softmax(-1)
    weights = at_loss(BATCH.weights, BATCH).double()
    middle = (weights / weights.sum())[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    return torch.einsum("nci,ncd,ndj->ij", jacobian, middle, jacobian)


def test_the_gauss_newton_matrix_is_the_explicit_product():
    expected = explicit_ggn()
    operator = ggn_operator(logits, output_loss, ADAPTERS)
    close(to_matrix(operator, ADAPTERS), expected, 1e-12)
    v = directions(ADAPTERS)
    close(ravel(ggnvp(logits, output_loss, ADAPTERS, v))[0], expected @ ravel(v)[0], 1e-12)
    assert float(torch.linalg.eigvalsh(to_matrix(operator, ADAPTERS)).min()) > -1e-12
    assert relative(expected, hessian(loss, ADAPTERS)) > 1e-2  # and is not the Hessian


def test_of_a_squared_error_it_is_the_square_of_the_jacobian():
    jacobian, v = explicit_jacobian(logits, ADAPTERS), directions(ADAPTERS)
    product = ggnvp(logits, lambda z: z.square().sum() / 2, ADAPTERS, v)
    close(ravel(product)[0], jacobian.T @ (jacobian @ ravel(v)[0]), 1e-11)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_operators_are_symmetric_and_those_of_single_products(kind: str):
    """DoRA's too, whose row norms are constants to each derivative."""
    fresh: Any = {"lora": lambda: fgpt.lora(BASE, fgpt.key(0), 2), "dora": lambda: fgpt.dora(BASE, fgpt.key(0), 2)}
    make = fresh.get(kind, lambda: fgpt.ia3(BASE))
    at = with_noise(astype(make(), torch.float64), 0.1)
    u, v = directions(at, 1), directions(at, 2)
    for operator, single in (
        (hessian_operator(loss, at), lambda x: hvp(loss, at, x)),
        (ggn_operator(logits, output_loss, at), lambda x: ggnvp(logits, output_loss, at, x)),
    ):
        assert relative(operator(v), single(v)) < 1e-12
        assert float(dot(u, operator(v))) == pytest.approx(float(dot(v, operator(u))), rel=1e-10)


@settings(max_examples=10)
@given(st.integers(1, 5), st.integers(0, 99))
def test_several_vectors_by_vmap(count: int, seed: int):
    many = [directions(ADAPTERS, seed + i) for i in range(count)]
    stacked = tree_map(lambda *xs: torch.stack(xs), *many)
    for operator in (OPERATOR, GGN_OPERATOR, lambda v: hvp(loss, ADAPTERS, v)):
        close(vmap(operator)(stacked), tree_map(lambda *xs: torch.stack(xs), *map(operator, many)), 1e-11)


OPERATOR = hessian_operator(loss, ADAPTERS)
GGN_OPERATOR = ggn_operator(logits, output_loss, ADAPTERS)


def test_under_transforms():
    """Of an ensemble; and differentiated: of vᵀ H v by v, which is 2 H v, and by the params."""
    many = [with_noise(ADAPTERS, 0.1, seed) for seed in range(2)]
    stacked, v = tree_map(lambda *xs: torch.stack(xs), *many), directions(ADAPTERS)
    for product in (
        lambda at: hvp(loss, at, v),
        lambda at: hessian_operator(loss, at)(v),
        lambda at: ggnvp(logits, output_loss, at, v),
        lambda at: ggn_operator(logits, output_loss, at)(v),
    ):
        close(vmap(product)(stacked), tree_map(lambda *xs: torch.stack(xs), *map(product, many)), 1e-11)
    for operator in (OPERATOR, GGN_OPERATOR):
        by_v = grad(lambda v, op=operator: dot(v, op(v)))(v)
        close(by_v, tree_map(lambda x: 2 * x, operator(v)), 1e-11)
    by_params = grad(lambda at: dot(v, hvp(loss, at, v)))(ADAPTERS)
    h, slope = 1e-4, float(dot(by_params, v))
    ends = [float(dot(v, hvp(loss, tree_map(lambda x, d, s=s: x + s * h * d, ADAPTERS, v), v))) for s in (1, -1)]
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize(("to", "bound"), [("nf4", 1e-5), ("blockwise8", 1e-5), ("int8", 0.03)])
def test_products_over_a_quantized_base_are_those_over_its_values(to: Any, bound: float, exact_derivatives: None):
    """But for int8, whose matmul rounds its inputs: 2 %, as its gradient has."""
    quantized = fgpt.quantize(tiny(d_model=64, d_mlp=128, n_layer=2), to)
    dequantized = fgpt.merge(quantized, base="dequantized")
    at = with_noise(fgpt.lora(quantized, fgpt.key(0), 2), 0.05)
    v = directions(at)
    for product in (
        lambda base: hvp(lambda a: loss(a, base), at, v),
        lambda base: hessian_operator(lambda a: loss(a, base), at)(v),
        lambda base: ggnvp(lambda a: logits(a, base), output_loss, at, v),
        lambda base: ggn_operator(lambda a: logits(a, base), output_loss, at)(v),
    ):
        assert relative(product(quantized), product(dequantized)) < bound


def test_an_int8_base_has_the_hessian_of_its_own_gradient(exact_derivatives: None):
    """Both products agree, and are symmetric, though the outputs are rounded."""
    base = fgpt.quantize(tiny(d_model=64, d_mlp=128, n_layer=2), "int8")
    at = with_noise(fgpt.lora(base, fgpt.key(0), 2), 0.05)
    u, v = directions(at, 1), directions(at, 2)
    operator = hessian_operator(lambda a: loss(a, base), at)
    assert relative(operator(v), hvp(lambda a: loss(a, base), at, v)) < 1e-5
    scale = float(dot(u, u).sqrt() * dot(operator(v), operator(v)).sqrt())
    assert float(dot(u, operator(v))) == pytest.approx(float(dot(v, operator(u))), abs=1e-5 * scale)


# -------------------------------------------------------------------------------------------------------------- inputs


def test_vectors_are_in_the_order_of_the_params():
    v = directions(ADAPTERS)
    backwards = dict(reversed(v.items()))
    close(list(hvp(loss, ADAPTERS, backwards).values()), list(hvp(loss, ADAPTERS, v).values()), 0.0)


def test_a_tensor_is_a_tree():
    x = torch.tensor([2.0, 3.0])
    close(hvp(lambda x: x.prod(), x, torch.tensor([1.0, 0.0])), torch.tensor([0.0, 1.0]), 0.0)
    close(hessian(lambda x: x.pow(3).sum(), x), torch.tensor([[12.0, 0.0], [0.0, 18.0]]), 0.0)
    assert to_matrix(lambda v: v, {}).shape == (0, 0)


def test_what_cannot_be_multiplied():
    x = {"w": torch.ones(2)}

    def square(p: Any) -> Tensor:
        return p["w"].square().sum()

    for call, says in (
        (lambda: hvp(square, x, {"v": torch.ones(2)}), "v is in one of them alone"),
        (lambda: hvp(square, x, {"w": torch.ones(3)}), r"w is float32 \[3\], not float32 \[2\]"),
        (lambda: hessian_operator(square, x)({"w": torch.ones(2).double()}), r"w is float64 \[2\]"),
        (lambda: hvp(lambda t: t.sum(), torch.ones(2), x), "the tensor is in one of them alone|w is in one"),
        (lambda: hvp(lambda p: p["w"], x, x), r"returns a scalar, such as fgpt.loss; got float32 \[2\]"),
        (lambda: hessian(lambda p: (square(p), 1), x), "got tuple"),
        (lambda: ggn_operator(lambda p: p["w"], lambda z: z, x), "returns a scalar"),
        (lambda: to_matrix(lambda v: v, x, chunk_size=0), "chunk_size is 0"),
    ):
        with pytest.raises(fgpt.InputError, match=says):
            call()


def test_a_chunk_is_all_that_is_computed_at_once():
    widths: list[int] = []

    def operator(v: Any) -> Any:
        return {"w": widen(v["w"])}

    def widen(x: Tensor) -> Tensor:
        from fgpt.kernels.functorch_state import num_vmapped

        widths.append(num_vmapped(x))
        return 2 * x

    close(to_matrix(operator, {"w": torch.zeros(10)}, chunk_size=4), 2 * torch.eye(10), 0.0)
    assert widths == [4, 4, 2]
    assert tree_leaves(operator({"w": torch.ones(1)}))[0].item() == 2.0
