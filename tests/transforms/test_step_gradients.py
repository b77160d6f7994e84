"""Steps by other gradients, beside loops, hand-worked cases and expectations."""

from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise
from torch import Tensor
from torch.func import grad, vmap

import fgpt
from fgpt.losses import Batch
from fgpt.optim import Optimizer, global_norm
from fgpt.train_step import Gradient
from fgpt.transforms.step_gradients import forward_gradient, per_row_clipping, sharpness_aware, zeroth_order
from fgpt.tree import ravel, tree_leaves, tree_map

BASE = tiny()
ADAPTERS = with_noise(fgpt.lora(BASE, fgpt.key(0), 2, dropout=0.3), 0.1)
TEXT = tokens(31, 4, 9)
WEIGHTS = torch.rand(4, 8, generator=fgpt.key(1)) * torch.tensor([[1.0], [5.0], [0.2], [1.0]])
BATCH = Batch(TEXT[:, :-1], TEXT[:, 1:], WEIGHTS, loss_positions=torch.arange(32))


def loss(adapters: Any, base: Any, batch: Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(base, adapters, rng=seed), batch)


def sgd() -> Optimizer:
    """The gradient itself, as the change of the params."""
    return Optimizer(lambda params: (), lambda g, state, params: (tree_map(torch.sub, params, g), state))


def step_gradient(gradient: Any, rng: Any = None, base: Any = BASE) -> Any:
    """What a step subtracts, times the weight of its batch."""
    step = fgpt.make_step(loss, sgd(), max_norm=None, gradient=gradient)
    state, metrics = step(fgpt.init_state(ADAPTERS, sgd()), base, [BATCH], rng)
    return tree_map(lambda a, b: (a - b) * metrics.weight, ADAPTERS, state.trainable), metrics


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("bound", [1e-3, 5.0, 1e9])
def test_each_row_is_clipped(bound: float, seed: int | None):
    key = None if seed is None else fgpt.key(seed)
    got, metrics = step_gradient(per_row_clipping(bound), key)
    total, norms = tree_map(torch.zeros_like, ADAPTERS), []
    for i in range(4):
        row = Batch(TEXT[i : i + 1, :-1], TEXT[i : i + 1, 1:], WEIGHTS[i : i + 1])
        own = None if key is None else fgpt.fold_in(fgpt.seed_tensor(fgpt.fold_in(key, 0)), i)
        g = grad(lambda a, row=row, own=own: loss(a, BASE, row, own)[0])(ADAPTERS)
        norms.append(float(global_norm(g)))
        total = tree_map(lambda t, x, n=norms[-1]: t + x * min(1.0, bound / n), total, g)
    assert max(norms) > 1e-3
    close(got, total, 2e-4)
    assert float(metrics.weight) == pytest.approx(float(WEIGHTS.sum()))
    if bound == 1e9 and seed is None:
        close(got, step_gradient(None)[0], 2e-4)  # unclipped it is the gradient of the batch


def test_sharpness_aware_is_the_gradient_nearby():
    got, metrics = step_gradient(sharpness_aware(0.05))
    first = grad(lambda a: loss(a, BASE, BATCH, None)[0])(ADAPTERS)
    nearby = tree_map(lambda x, g: x + 0.05 * g / global_norm(first), ADAPTERS, first)
    close(got, grad(lambda a: loss(a, BASE, BATCH, None)[0])(nearby), 5e-4)
    value, weight = loss(ADAPTERS, BASE, BATCH, None)
    assert float(metrics.loss) == pytest.approx(float(value / weight), rel=1e-6)  # before the detour


@pytest.mark.parametrize("gradient", [zeroth_order(1e-3), forward_gradient()])
def test_an_estimate_has_the_gradient_as_its_mean(gradient: Gradient):
    """In float64, of a linear loss in ten elements: the mean of z zᵀ g is g."""
    g = torch.arange(10, dtype=torch.float64)

    def linear(tree: Any, frozen: Any, batch: Any, seed: Any) -> tuple[Tensor, Tensor]:
        return (tree["w"] * g).sum(), torch.tensor(1.0)

    tree = {"w": torch.zeros(10, dtype=torch.float64)}
    seeds = torch.arange(20_000)
    each = vmap(lambda seed: gradient(linear, tree, None, None, seed)[0]["w"])(seeds)
    assert float((each.mean(0) - g).norm() / g.norm()) < 0.05
    close(each[5], gradient(linear, tree, None, None, seeds[5])[0]["w"], 1e-9)
    a, b = (gradient(linear, tree, None, None, torch.tensor(i))[0]["w"] for i in (1, 2))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("gradient", [zeroth_order(1e-5), forward_gradient()])
@pytest.mark.parametrize("to", [None, "nf4"])
def test_of_a_model_too_over_many_keys(gradient: Gradient, to: Any):
    """The mean of n estimates is (p + 1)/n of the squared norm away from a gradient of p elements."""
    base: Any = tiny(n_layer=1, d_model=64, d_mlp=64)
    base = base if to is None else fgpt.quantize(base, to)
    tree = {"blocks.0.attn.q": fgpt.IA3(row=torch.ones(64, dtype=torch.float64))}
    batch = Batch(TEXT[:2, :4], TEXT[:2, 1:5], WEIGHTS[:2, :4])
    each, _ = vmap(lambda seed: gradient(loss, tree, base, batch, seed))(torch.arange(2000))
    mean, expected = (
        ravel(x)[0] for x in (tree_map(lambda x: x.mean(0), each), grad(lambda a: loss(a, base, batch, None)[0])(tree))
    )
    assert float((mean - expected).norm() / expected.norm()) < 2 * (65 / 2000) ** 0.5


@pytest.mark.parametrize("seed", [1, 2])
def test_a_forward_gradient_is_the_projection_on_its_direction(seed: int):
    """With dropout, which is the same as that of the gradient with this seed."""
    key = torch.tensor(seed)
    g = grad(lambda a: loss(a, BASE, BATCH, key)[0])(ADAPTERS)
    (estimate, (value, weight)) = forward_gradient()(loss, ADAPTERS, BASE, BATCH, key)
    first, slope = ravel(estimate)[0], ravel(g)[0]
    direction = first / first.norm()
    square = float(first.norm() / (direction @ slope))  # ‖z‖ |z·g| / (z·g / ‖z‖) times the sign, which z·g has twice
    assert square == pytest.approx(len(first), rel=0.1)
    close((value, weight), loss(ADAPTERS, BASE, BATCH, key), 1e-4)


def test_steps_by_them_train_and_can_be_mapped_over():
    for gradient in (per_row_clipping(1.0), sharpness_aware(0.01), zeroth_order(1e-3), forward_gradient()):
        optimizer = fgpt.adamw(1e-3)
        step = fgpt.make_step(loss, optimizer, gradient=gradient)
        many = [with_noise(ADAPTERS, 0.01, seed) for seed in range(2)]
        states = tree_map(lambda *xs: torch.stack(xs), *(fgpt.init_state(a, optimizer) for a in many))
        got, _ = vmap(lambda s, k, step=step: step(s, BASE, [BATCH], k))(states, torch.arange(2))
        for i, adapters in enumerate(many):
            alone, _ = step(fgpt.init_state(adapters, optimizer), BASE, [BATCH], torch.tensor(i))
            moved = [(x - y).abs().max() for x, y in zip(tree_leaves(alone.trainable), tree_leaves(adapters))]
            assert max(moved) > 1e-4
            near = [(x[i] - y).abs() for x, y in zip(tree_leaves(got.trainable), tree_leaves(alone.trainable))]
            assert sum(float((x > 1e-4).sum()) for x in near) <= 0.02 * sum(x.numel() for x in near)


def test_half_precision_neither_overflows_nor_loses_a_norm():
    from fgpt.transforms.per_example import per_example_norms

    for number in (300.0, 1e-4):
        row = Batch(torch.zeros(1, 64).long(), torch.zeros(1, 64).long(), torch.full((1, 64), number))

        def dot(params: Any, example: Batch) -> Tensor:
            return (params["w"] * example.weights.to(params["w"].dtype)).sum()

        norms = per_example_norms(dot, {"w": torch.zeros(1, 64, dtype=torch.float16)}, [row])
        assert float(norms[0]) == pytest.approx(8 * number, rel=1e-2)


def test_a_zeroth_order_step_can_be_differentiated():
    """In the weights of the loss: the estimate is linear in them."""

    def weighted(tree: Any, frozen: Any, batch: Any, seed: Any) -> tuple[Tensor, Tensor]:
        return batch * (tree["w"] * 3).sum(), torch.tensor(1.0)

    def estimate(u: Tensor) -> Tensor:
        tree = {"w": torch.zeros(4, dtype=torch.float64)}
        return zeroth_order(1e-3)(weighted, tree, None, u, torch.tensor(5))[0]["w"].sum()

    u = torch.tensor(2.0, dtype=torch.float64)
    assert float(grad(estimate)(u)) == pytest.approx(float(estimate(u) / u), rel=1e-6)


def test_wrong_numbers_and_batches():
    line = Batch(TEXT[0, :-1], TEXT[0, 1:], WEIGHTS[0])
    with pytest.raises(fgpt.InputError, match="got tokens of shape"):
        per_row_clipping(1.0)(loss, ADAPTERS, BASE, line, None)
    half = tree_map(lambda x: x.bfloat16(), ADAPTERS)
    with pytest.raises(fgpt.InputError, match="expected fp32 or fp64"):
        zeroth_order()(loss, half, BASE, BATCH, torch.tensor(1))
    for call in (lambda: per_row_clipping(0.0), lambda: sharpness_aware(-1.0), lambda: zeroth_order(0.0)):
        with pytest.raises(fgpt.InputError, match="expected a positive number"):
            call()
    for gradient in (zeroth_order(), forward_gradient()):
        with pytest.raises(fgpt.InputError, match="give the step a key"):
            step_gradient(gradient)
    with pytest.raises(fgpt.InputError, match="leave one of them out"):
        fgpt.make_step(loss, sgd(), gradient=sharpness_aware(), compile=True)
