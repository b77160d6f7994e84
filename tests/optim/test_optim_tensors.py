"""An optimizer's numbers as tensors: mapped over in a sweep, differentiated by in a metagradient."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import close, same, tiny, tokens, with_noise
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.optim import constant_schedule, cosine_schedule, global_norm, linear_schedule
from fgpt.tree import astype, tree_map

GPT = astype(tree_map(lambda x: 0.5 * x, tiny(n_layer=1)), torch.float64)
FRESH: Any = astype(fgpt.lora(GPT, fgpt.key(0), 2, target=r"blocks\..*"), torch.float64)
ROWS = fgpt.Batch(tokens(31, 3, 8), tokens(31, 3, 8, seed=1), torch.rand(3, 8, generator=fgpt.key(0)))
OTHER = fgpt.Batch(tokens(31, 2, 8, seed=2), tokens(31, 2, 8, seed=3), torch.ones(2, 8))
TREE = {"w": torch.randn(3, 4, generator=fgpt.key(0)), "b": torch.randn(4, generator=fgpt.key(1))}
GRADS = [tree_map(lambda x, i=i: torch.randn(x.shape, generator=fgpt.key(i)), TREE) for i in range(4)]


def objective(adapters: Any, params: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters), batch)


def update_once(optimizer: fgpt.Optimizer) -> Any:
    params, state = TREE, optimizer.init(TREE)
    for grads in GRADS:
        params, state = optimizer.update(grads, state, params)
    return params


MAKE: dict[str, tuple[Callable[[Any], fgpt.Optimizer], list[float]]] = {
    "lr": (fgpt.adamw, [1e-3, 2e-2]),
    "constant, lr": (lambda x: fgpt.adamw(constant_schedule(x, 2)), [1e-3, 2e-2]),
    "constant, warmup": (lambda x: fgpt.adamw(constant_schedule(1e-2, x)), [0, 1, 3]),
    "linear, steps": (lambda x: fgpt.adamw(linear_schedule(1e-2, x, warmup_steps=2)), [3, 6]),
    "linear, end": (lambda x: fgpt.adamw(linear_schedule(1e-2, 4, warmup_steps=2, final_lr=x)), [1e-3, 2e-3]),
    "cosine, steps": (lambda x: fgpt.adamw(cosine_schedule(1e-2, x)), [1, 6]),
    "cosine, warmup": (lambda x: fgpt.adamw(cosine_schedule(1e-2, 6, warmup_steps=x)), [0, 2, 8]),
    "beta 1": (lambda x: fgpt.adamw(1e-2, (x, 0.99)), [0.8, 0.9]),
    "beta 2": (lambda x: fgpt.adamw(1e-2, (0.9, x)), [0.95, 0.999]),
    "eps": (lambda x: fgpt.adamw(1e-2, eps=x), [1e-8, 1e-2]),
    "eps_root": (lambda x: fgpt.adamw(1e-2, eps_root=x), [0.0, 1e-4]),
    "weight decay": (lambda x: fgpt.adamw(1e-2, weight_decay=x), [0.0, 0.3]),
    "8 bits, weight decay": (lambda x: fgpt.adamw8bit(1e-2, weight_decay=x), [0.0, 0.3]),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_sweep_over_it_is_each_of_it(name: str):
    make, values = MAKE[name]
    swept = vmap(lambda x: update_once(make(x)))(torch.tensor(values))
    for i, x in enumerate(values):
        close(tree_map(lambda y, i=i: y[i], swept), update_once(make(x)), 1e-6)
        close(update_once(make(torch.tensor(x))), update_once(make(x)), 1e-6)
    assert not same(tree_map(lambda y: y[0], swept), tree_map(lambda y: y[-1], swept))


def test_eps_root_is_in_the_root():
    """m̂ / (√(v̂ + ε₀) + ε) by hand: after one step of g, m̂ = g and v̂ = g². 0 is torch's AdamW."""
    optimizer = fgpt.adamw(0.1, eps=0.01, eps_root=0.05)
    moved, _ = optimizer.update(GRADS[0], optimizer.init(TREE), TREE)
    close(moved, tree_map(lambda x, g: x - 0.1 * g / ((g * g + 0.05).sqrt() + 0.01), TREE, GRADS[0]), 1e-6)
    assert same(update_once(fgpt.adamw(0.1, eps_root=0.0)), update_once(fgpt.adamw(0.1)))
    hf = TREE["w"].clone().requires_grad_()
    reference = torch.optim.AdamW([hf], lr=0.1, weight_decay=0.0)
    for grads in GRADS:
        hf.grad = grads["w"].clone()
        reference.step()
    close(update_once(fgpt.adamw(torch.tensor(0.1)))["w"], hf.detach(), 1e-6)


def end_of(numbers: Tensor, batch: fgpt.Batch = ROWS) -> Tensor:
    """The loss on OTHER after three steps on `batch`, by rate, decay, warm-up and root."""
    lr, decay, warmup, root = numbers
    optimizer = fgpt.adamw(
        cosine_schedule(lr, 4, warmup_steps=warmup), (0.9, 0.99), eps=1e-6, weight_decay=decay, eps_root=root
    )
    step, state = fgpt.make_step(objective, optimizer, max_norm=None), fgpt.init_state(FRESH, optimizer)
    for _ in range(3):
        state, _ = step(state, GPT, [batch], None)
    return fgpt.loss(fgpt.adapt(GPT, state.trainable), OTHER)


NUMBERS = torch.tensor([3e-2, 0.1, 2.5, 1e-4], dtype=torch.float64)


def slope(f: Callable[[Tensor], Tensor], at: Tensor, v: Tensor, h: float) -> float:
    return float((8 * (f(at + h * v) - f(at - h * v)) - f(at + 2 * h * v) + f(at - 2 * h * v)) / (12 * h))


def test_a_metagradient_is_finite_differences():
    """Through training steps of a fresh LoRA, half of whose leaves have no gradient at first; by every derivative."""
    by_grad = grad(end_of)(NUMBERS)
    leaf = NUMBERS.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(end_of(leaf), leaf)
    for i, scale in enumerate((1e-4, 1e-3, 1e-3, 1e-7)):
        v = torch.eye(4, dtype=torch.float64)[i]
        expected = slope(end_of, NUMBERS, v, scale)
        assert float(by_grad[i]) == pytest.approx(expected, rel=1e-5)
        assert float(by_autograd[i]) == pytest.approx(expected, rel=1e-5)
        assert float(jvp(end_of, (NUMBERS,), (v,))[1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("by", ["grad", "autograd"])
def test_a_metagradient_by_the_weights_of_examples(by: str):
    def end(weights: Tensor) -> Tensor:
        return end_of(NUMBERS, fgpt.Batch(ROWS.tokens, ROWS.targets, weights[:, None] * ROWS.weights))

    at, v = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    leaf = at.clone().requires_grad_()
    got = grad(end)(at) if by == "grad" else torch.autograd.grad(end(leaf), leaf)[0]
    assert float(got @ v) == pytest.approx(slope(end, at, v, 1e-4), rel=1e-5)


def test_without_eps_root_there_is_no_derivative_where_v_is_0():
    assert (
        not grad(lambda w: end_of(NUMBERS * torch.tensor([1.0, 1.0, 1.0, 0.0]), w_rows(w)))(torch.ones(3))
        .isfinite()
        .all()
    )
    assert grad(lambda w: end_of(NUMBERS, w_rows(w)))(torch.ones(3)).isfinite().all()


def w_rows(w: Tensor) -> fgpt.Batch:
    return fgpt.Batch(ROWS.tokens, ROWS.targets, w[:, None] * ROWS.weights)


# ------------------------------------------------------------------------------------------------- a step's contract


@pytest.mark.parametrize(
    ("returns", "says"),
    [
        (lambda nll, w: nll, r"got a float64 tensor of shape \[\]"),
        (lambda nll, w: (nll, w, w), "got a tuple of 3"),
        (lambda nll, w: (nll, 3.0), r"got a tuple of 2 \(a float64 tensor of shape \[\], a float\)"),
        (lambda nll, w: (nll.expand(4), w), r"got a tuple of 2 \(a float64 tensor of shape \[4\], "),
        (lambda nll, w: (nll.long(), w), "got a tuple of 2 .a int64 tensor"),
        (lambda nll, w: None, "got a NoneType"),
    ],
)
def test_a_loss_that_returns_something_else(returns: Any, says: str):
    def loss(*args: Any) -> Any:
        return returns(*objective(*args))

    optimizer = fgpt.adamw(1e-3)
    state = fgpt.init_state(FRESH, optimizer)
    step = fgpt.make_step(loss, optimizer)
    expected = rf"returns two scalar tensors, \(Σ weight · nll, Σ weight\).*{says}"
    with pytest.raises(fgpt.InputError, match=expected):
        step(state, GPT, [ROWS], None)
    with pytest.raises(fgpt.InputError, match=expected):
        grad(lambda a: step(fgpt.init_state(a, optimizer), GPT, [ROWS], None)[1].loss)(FRESH)


def test_a_loss_with_vmap_inside():
    """The worst example's: make_step differentiates it from outside of vmap."""

    def worst(adapters: Any, params: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        return vmap(lambda row: fgpt.loss(fgpt.adapt(params, adapters), row))(batch).max(), torch.ones(())

    at, optimizer = with_noise(FRESH, 0.1), fgpt.adamw(1e-3)
    _, metrics = fgpt.make_step(worst, optimizer)(fgpt.init_state(at, optimizer), GPT, [ROWS], None)
    rows = [tree_map(lambda x, i=i: x[i], ROWS) for i in range(3)]
    losses = [fgpt.loss(fgpt.adapt(GPT, at), row) for row in rows]
    i = max(range(3), key=lambda i: float(losses[i]))
    assert float(metrics.loss) == pytest.approx(float(losses[i]), rel=1e-9)
    size = global_norm(grad(lambda a: fgpt.loss(fgpt.adapt(GPT, a), rows[i]))(at))
    assert float(metrics.grad_norm) == pytest.approx(float(size), rel=1e-9)


def test_a_compiled_step_says_where_it_is_not_compiled():
    optimizer = fgpt.adamw(1e-3)
    step = fgpt.make_step(objective, optimizer, compile=True)
    states = vmap(lambda a: fgpt.init_state(a, optimizer))(fgpt.stack_adapters([FRESH, FRESH]))
    with pytest.warns(UserWarning, match="compile=True runs uncompiled when it is mapped over or differentiated"):
        vmap(lambda s: step(s, GPT, [ROWS], None)[1].loss)(states)
    plain = fgpt.make_step(objective, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compile")
        vmap(lambda s: plain(s, GPT, [ROWS], None)[1].loss)(states)
