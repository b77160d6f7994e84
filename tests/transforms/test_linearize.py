"""The tangent model is linear, the first order of the model, and trained by a step; kernels equal J Jᵀ, in float64."""

from functools import cache
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
from fgpt.transforms.curvature import to_matrix
from fgpt.transforms.linearize import empirical_ntk, ntk_operator, tangent_model
from fgpt.transforms.spectrum import top_eigenpairs
from fgpt.tree import astype, ravel, tree_map

TEXT = tokens(31, 3, 7)
BATCH = fgpt.Batch(TEXT[:, :-1], TEXT[:, 1:], torch.rand(3, 6, generator=fgpt.key(1)))
BASE = astype(tiny(n_layer=1), torch.float64)
ORIGIN: Any = with_noise(
    astype(fgpt.lora(BASE, fgpt.key(0), 1, target=r".*\.(q|down)"), torch.float64)
    | fgpt.trainable_leaves(BASE, "ln_f.b"),
    0.2,
)


def logits_over(base: Any) -> Any:
    return lambda adapters, tokens: fgpt.apply(fgpt.adapt(base, adapters), tokens)


def moved(at: Any, size: float, seed: int = 1) -> Any:
    return with_noise(at, size, seed)


def line(start: Any, end: Any, t: float) -> Any:
    return tree_map(lambda x, y: x + t * (y - x), start, end)


def relative(x: Any, y: Any) -> float:
    """‖x - y‖ / ‖y‖ over all leaves."""
    a, b = ravel(x)[0].double(), ravel(y)[0].double()
    return float((a - b).norm() / b.norm())


def explicit_jacobian(fn: Any, at: Any) -> Tensor:
    """By plain autograd, one row after the other: [outputs elements]."""
    vector, unravel = ravel(at)
    point = vector.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(z, point, retain_graph=True)[0] for z in fn(unravel(point)).flatten()])


# ------------------------------------------------------------------------------------------------------- tangent model


def at_the_end(adapters: Any) -> Tensor:
    """Of two rows: [2, 31]."""
    return logits_over(BASE)(adapters, TEXT[:2])[:, -1]


@cache
def jacobian_of_logits() -> Tensor:
    return explicit_jacobian(at_the_end, ORIGIN)


@settings(max_examples=10)
@given(st.floats(-3, 3), st.integers(0, 99))
def test_it_is_the_expansion_of_the_model(t: float, seed: int):
    point = moved(ORIGIN, 1.0, seed)
    change = ravel(line(ORIGIN, point, t))[0] - ravel(ORIGIN)[0]
    expected = at_the_end(ORIGIN).flatten() + jacobian_of_logits() @ change
    close(tangent_model(at_the_end, ORIGIN)(line(ORIGIN, point, t)).flatten(), expected, 1e-11)


def test_at_the_origin_it_is_the_model_and_near_it_to_first_order():
    logits, point = logits_over(BASE), moved(ORIGIN, 1.0)
    linear_logits = tangent_model(logits, ORIGIN)
    close(linear_logits(ORIGIN, TEXT), logits(ORIGIN, TEXT), 1e-13)
    errors = []
    for t in (1e-2, 1e-3):
        near = line(ORIGIN, point, t)
        errors.append(float((linear_logits(near, TEXT) - logits(near, TEXT)).norm()))
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)  # of second order


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_its_derivative_is_the_same_everywhere(kind: str):
    fresh: Any = {"lora": lambda: fgpt.lora(BASE, fgpt.key(0), 2), "dora": lambda: fgpt.dora(BASE, fgpt.key(0), 2)}
    origin = with_noise(astype(fresh.get(kind, lambda: fgpt.ia3(BASE))(), torch.float64), 0.1)
    logits, u = logits_over(BASE), torch.randn(3, 7, 31, generator=fgpt.key(2), dtype=torch.float64)
    linear_logits = tangent_model(logits, origin)
    of_model = grad(lambda a: (u * logits(a, TEXT)).sum())
    of_tangent = grad(lambda a: (u * linear_logits(a, TEXT)).sum())
    there = moved(origin, 1.0)
    close(of_tangent(there), of_model(origin), 1e-9)
    assert relative(of_model(there), of_model(origin)) > 0.1


def test_of_a_fresh_lora_it_has_no_derivative_in_a():
    fresh: Any = astype(fgpt.lora(BASE, fgpt.key(0), 2), torch.float64)
    linear_logits = tangent_model(logits_over(BASE), fresh)
    slopes: Any = grad(lambda a: linear_logits(a, TEXT).square().sum())(moved(fresh, 0.1))
    assert all(not x.a.any() and x.b.any() for x in slopes.values())


def linear_nll(linear_logits: Any) -> Any:
    """A loss of `make_step`, from the logits of a tangent model."""

    def loss(adapters: Any, base: Any, batch: fgpt.Batch, seed: Any) -> tuple[Tensor, Tensor]:
        z = linear_logits(adapters, batch.tokens).flatten(0, 1)
        losses = F.cross_entropy(z, batch.targets.flatten(), reduction="none")
        weights = batch.weights.flatten().to(losses.dtype)
        return (weights * losses).sum(), weights.sum()

    return loss


@pytest.mark.parametrize(("to", "bound"), [(None, 1e-4), ("nf4", 1e-4), ("blockwise8", 1e-4), ("int8", 5e-3)])
def test_a_step_trains_it_over_any_base(to: Any, bound: float, exact_derivatives: None):
    """Its gradient is that of the affine function f(θ₀) + J (θ - θ₀), whose J comes from vector-Jacobian products.
    int8 rounds its inputs: a bit of theirs may move one by a step.
    """
    base: Any = tiny(d_model=64, d_mlp=64, n_layer=1)
    base = base if to is None else fgpt.quantize(base, to)
    origin = with_noise(fgpt.lora(base, fgpt.key(0), 1, target=r".*\.(q|down)"), 0.1)
    logits = logits_over(base)
    jacobian = vmap(lambda u: ravel(torch.func.vjp(lambda a: logits(a, BATCH.tokens), origin)[1](u)[0])[0])(
        torch.eye(18 * 31).view(-1, 3, 6, 31)
    )

    def affine_logits(adapters: Any, tokens: Tensor) -> Tensor:
        change = ravel(adapters)[0] - ravel(origin)[0]
        return logits(origin, tokens) + (jacobian @ change).view(3, 6, 31)

    sgd = fgpt.Optimizer(lambda params: (), lambda g, s, params: (tree_map(lambda x, y: x - 0.1 * y, params, g), s))
    ends, losses = [], []
    for model in (tangent_model(logits, origin), affine_logits):
        step, state = fgpt.make_step(linear_nll(model), sgd), fgpt.init_state(origin, sgd)
        for _ in range(3):
            state, metrics = step(state, base, [BATCH], None)
            losses.append(float(metrics.loss))
        ends.append(tree_map(torch.sub, state.trainable, origin))
    assert relative(*ends) < bound
    assert losses[2] < losses[0]
    assert losses[:3] == pytest.approx(losses[3:], rel=bound)


def test_it_can_be_mapped_over():
    linear_logits = tangent_model(logits_over(BASE), ORIGIN)
    many = [moved(ORIGIN, 0.3, seed) for seed in range(2)]
    stacked = tree_map(lambda *xs: torch.stack(xs), *many)
    each = vmap(linear_logits, in_dims=(0, None))(stacked, TEXT)
    close(each, torch.stack([linear_logits(a, TEXT) for a in many]), 1e-11)


def test_params_of_another_form():
    linear_logits = tangent_model(logits_over(BASE), ORIGIN)
    with pytest.raises(fgpt.InputError, match="is in one of them alone"):
        linear_logits({"ln_f.b": ORIGIN["ln_f.b"]}, TEXT)


def test_outputs_may_be_a_tree_and_dicts_in_another_order():
    fn = tangent_model(lambda p: {"square": p["x"] ** 2, "product": p["x"] * p["y"]}, {"x": three(), "y": three() + 2})
    got = fn({"y": three() + 2, "x": three() + 1})
    assert {name: float(x) for name, x in got.items()} == {"square": 15.0, "product": 20.0}


def three() -> Tensor:
    return torch.tensor(3.0)


# -------------------------------------------------------------------------------------------------------------- kernel


def margin(adapters: Any, row: fgpt.Batch, base: Any = BASE) -> Tensor:
    """Of two logits at the last position that has a weight."""
    z = fgpt.apply(fgpt.adapt(base, adapters), row.tokens)
    return ((z[..., 0] - z[..., 1]) * row.weights).sum()


def rows(count: int) -> list[fgpt.Batch]:
    """Of other lengths, with weight at the last position alone."""
    texts = [tokens(31, 1, 3 + i % 4, seed=i) for i in range(count)]
    return [fgpt.Batch(x, x, torch.arange(x.shape[1])[None].eq(x.shape[1] - 1).double()) for x in texts]


@pytest.mark.parametrize(("block_size", "chunk_size"), [(None, None), (2, 1), (1, None), (9, 2)])
def test_the_kernel_is_the_explicit_product(block_size: int | None, chunk_size: int | None):
    examples = rows(5)
    for fn in (margin, lambda a, row: fgpt.nll(fgpt.adapt(BASE, a), row)[0]):
        jacobian = explicit_jacobian(lambda a, fn=fn: torch.stack([fn(a, row) for row in examples]), ORIGIN)
        kernel = empirical_ntk(fn, ORIGIN, examples, block_size=block_size, chunk_size=chunk_size)
        assert kernel.dtype == torch.float64
        close(kernel, jacobian @ jacobian.T, 1e-10)
    assert float(kernel.abs().min()) > 1e-6


def last_logits(adapters: Any, base: Any = BASE) -> Tensor:
    """Of a few tokens: [3 examples, 2 tokens]."""
    return fgpt.apply(fgpt.adapt(base, adapters), TEXT)[:, -1, :2]


def test_the_operator_is_the_explicit_product_and_has_its_trace_and_its_spectrum():
    jacobian = explicit_jacobian(last_logits, ORIGIN)
    operator, like = ntk_operator(last_logits, ORIGIN), last_logits(ORIGIN)
    kernel = to_matrix(operator, like)
    close(kernel, jacobian @ jacobian.T, 1e-11)
    each = jacobian.view(3, 2, -1)
    expected = torch.stack([torch.stack([(x * y).sum() for y in each]) for x in each])
    close(torch.einsum("iojo->ij", kernel.view(3, 2, 3, 2)), expected, 1e-11)
    values = top_eigenpairs(operator, like, fgpt.key(0), k=2).values
    close(values, torch.linalg.eigvalsh(kernel).flip(0)[:2], 1e-9)


def test_both_kernels_agree_with_the_tangent_model():
    """θ₀ + Jᵀ K⁻¹ (y - f(θ₀)), the kernel regression, has the outputs y in the tangent model."""
    y = torch.randn(3, 2, generator=fgpt.key(3), dtype=torch.float64)
    kernel = to_matrix(ntk_operator(last_logits, ORIGIN), y)
    dual = torch.linalg.solve(kernel, (y - last_logits(ORIGIN)).flatten()).view(3, 2)
    change: Any = torch.func.vjp(last_logits, ORIGIN)[1](dual)[0]
    close(tangent_model(last_logits, ORIGIN)(tree_map(torch.add, ORIGIN, change)), y, 1e-9)


@pytest.mark.parametrize("to", ["nf4", "blockwise8", "int8"])
def test_kernels_over_quantized_bases(to: Any, exact_derivatives: None):
    base = fgpt.quantize(tiny(d_model=64, d_mlp=64, n_layer=1), to)
    origin, examples = with_noise(fgpt.lora(base, fgpt.key(0), 2), 0.1), rows(3)
    examples = [fgpt.Batch(x.tokens, x.targets, x.weights.float()) for x in examples]
    one_by_one = [grad(lambda a, row=row: margin(a, row, base))(origin) for row in examples]
    expected = torch.stack([torch.stack([dot(x, y) for y in one_by_one]) for x in one_by_one])
    bound = 5e-2 if to == "int8" else 1e-5  # int8 rounds its inputs by row, which padding may change by a bit
    assert relative(empirical_ntk(lambda a, row: margin(a, row, base), origin, examples), expected) < bound
    each = [grad(lambda a, i=i: last_logits(a, base).flatten()[i])(origin) for i in range(6)]
    expected = torch.stack([torch.stack([dot(x, y) for y in each]) for x in each])
    operator = ntk_operator(lambda a: last_logits(a, base), origin)
    assert relative(to_matrix(operator, last_logits(origin, base)), expected) < (5e-3 if to == "int8" else 1e-5)


def test_what_has_no_kernel():
    for call, says in (
        (lambda: empirical_ntk(margin, ORIGIN, []), "there are no examples"),
        (lambda: empirical_ntk(margin, ORIGIN, rows(2), block_size=0), "block_size is 0"),
        (lambda: ntk_operator(last_logits, ORIGIN)(torch.zeros(3, dtype=torch.float64)), r"float64 \[3\]"),
    ):
        with pytest.raises(fgpt.InputError, match=says):
            call()
