"""Schedule-free AdamW is its authors': gradients at y, evaluation at x."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from builders import close, same, tiny, tokens
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.kernels import schedule_free
from fgpt.kernels.schedule_free import ScheduleFreeNumbers, schedule_free_update
from fgpt.optim import constant_schedule
from fgpt.tree import leaves, tree_map

TREE = {"w": torch.randn(3, 4, generator=fgpt.key(0)), "b": torch.randn(4, generator=fgpt.key(1))}
TREE = tree_map(torch.Tensor.double, TREE | {"head.w": torch.randn(2, 3, generator=fgpt.key(2))})


def gradients(step: int) -> dict[str, Tensor]:
    """Of very unequal sizes, and zero in every fifth step."""
    rng = fgpt.key(step)
    return {
        name: (step % 5) * 10.0 ** (i - 2) * torch.randn(x.shape, generator=rng, dtype=torch.float64)
        for i, (name, x) in enumerate(TREE.items())
    }


class ByHand:
    """Algorithm 1 of the paper for one leaf, with its three points apart, in the paper's letters.

    The learning rate is that of the authors' code: γ_t = γ · warmup · √(1 - β₂ᵗ), and c_t the share of max γ².
    """

    def __init__(self, start: Tensor, lr: float, betas: tuple[float, float], eps: float, decay: float, warmup: int):
        self.x, self.y, self.z = start, start, start
        self.v = torch.zeros_like(start)
        self.numbers = lr, betas, eps, decay, warmup
        self.t, self.gamma_max, self.total = 0, 0.0, 0.0

    def step(self, g: Tensor) -> None:
        lr, (beta1, beta2), eps, decay, warmup = self.numbers
        self.t += 1
        gamma = lr * min(1.0, self.t / max(warmup, 1)) * math.sqrt(1 - beta2**self.t)
        self.gamma_max = max(gamma, self.gamma_max)
        self.total += self.gamma_max**2
        c = self.gamma_max**2 / self.total
        self.v = beta2 * self.v + (1 - beta2) * g * g
        self.z = self.z - gamma * g / (self.v.sqrt() + eps) - gamma * decay * self.y
        self.x = (1 - c) * self.x + c * self.z
        self.y = (1 - beta1) * self.z + beta1 * self.x


@pytest.mark.parametrize(
    ("betas", "eps", "decay", "warmup", "decayed"),
    [
        ((0.9, 0.999), 1e-8, 0.0, 0, []),
        ((0.9, 0.999), 1e-8, 0.1, 10, ["w", "head.w"]),  # never the bias
        ((0.95, 0.99), 1e-4, 0.3, 60, ["w", "head.w"]),
    ],
)
def test_it_is_its_authors(betas: Any, eps: float, decay: float, warmup: int, decayed: list[str]):
    by_hand = {name: ByHand(x, 0.03, betas, eps, decay if name in decayed else 0.0, warmup) for name, x in TREE.items()}
    optimizer = fgpt.schedule_free_adamw(constant_schedule(0.03, warmup), betas, eps=eps, weight_decay=decay)
    params, state = TREE, optimizer.init(TREE)
    assert same(optimizer.evaluation_params(state, params), TREE)
    for step in range(1, 51):
        grads = gradients(step)
        for name, x in by_hand.items():
            x.step(grads[name])
        params, state = optimizer.update(grads, state, params)
        close(params, {name: x.y for name, x in by_hand.items()}, 1e-10)
        close(state.z, {name: x.z for name, x in by_hand.items()}, 1e-10)
        close(optimizer.evaluation_params(state, params), {name: x.x for name, x in by_hand.items()}, 1e-10)
    assert state.count == 50
    assert (params["w"] - optimizer.evaluation_params(state, params)["w"]).abs().max() > 1e-3


def test_only_it_evaluates_other_params():
    for optimizer in (fgpt.adamw(0.1), fgpt.adamw8bit(0.1), fgpt.muon(0.1)):
        params, state = optimizer.update(gradients(1), optimizer.init(TREE), TREE)
        assert optimizer.evaluation_params(state, params) is params


def test_it_minimizes_without_a_decay():
    """Noisy gradients of a quadratic: the average is nearer than any late iterate."""
    optimizer = fgpt.schedule_free_adamw(0.1)
    params: Any = {"w": torch.full((20,), 3.0)}
    state = optimizer.init(params)
    for step in range(400):
        noise = torch.randn(20, generator=fgpt.key(step))
        params, state = optimizer.update({"w": params["w"] + noise}, state, params)
    average = optimizer.evaluation_params(state, params)["w"]
    assert average.square().mean() < 0.3 * state.z["w"].square().mean()


# ----------------------------------------------------------------------------------------------------------- kernel


def numbers(**changes: Any) -> ScheduleFreeNumbers:
    eta, average = torch.tensor([0.01, 0.2])
    return ScheduleFreeNumbers(eta, average, 0.9, 0.999, 1e-8, 0.0, 0.0)._replace(**changes)


def lists(dtype: torch.dtype = torch.float32) -> list[Sequence[Tensor]]:
    shapes = [(3, 5), (17,), (8, 64), ()]
    columns = [
        [torch.randn(s, generator=fgpt.key(10 * i + j)).to(dtype) for j, s in enumerate(shapes)] for i in range(4)
    ]
    return [*columns[:3], [x.square() for x in columns[3]]]


@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.1}, {"eps_root": 1e-6, "weight_decay": 0.3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lists_are_the_reference(dtype: torch.dtype, changes: Any):
    at, n = lists(dtype), numbers(**changes)
    before = tree_map(torch.clone, at)
    got = schedule_free_update(*at, numbers=n)
    wide = torch.promote_types(dtype, torch.float32)
    n = n._replace(eta=n.eta.to(wide), average=n.average.to(wide))
    rows = [schedule_free.reference(*(x.to(wide) for x in xs), n) for xs in zip(*at, strict=True)]
    expected = [list(column) for column in zip(*rows, strict=True)]
    close(got[0], [x.to(dtype) for x in expected[0]], 2**-7 if dtype == torch.bfloat16 else 1e-6)
    close(got[1:], expected[1:], 1e-6)
    assert same(at, before)
    assert {x.dtype for x in got[0]} == {dtype}


def test_numbers_that_are_tensors_are_the_same_numbers():
    n = numbers(weight_decay=0.1, eps_root=1e-6)
    as_tensors = ScheduleFreeNumbers(*(torch.as_tensor(x, dtype=torch.float64) for x in n))
    close(schedule_free_update(*lists(), numbers=as_tensors), schedule_free_update(*lists(), numbers=n), 1e-6)


# ------------------------------------------------------------------------------------------------------- transforms

BASE = tiny(n_layer=1)
BATCH = fgpt.Batch(tokens(31, 2, 8), tokens(31, 2, 8, seed=1), torch.ones(2, 8))


def objective(adapters: Any, params: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters), batch)


def test_a_stack_under_vmap_is_its_members():
    optimizer = fgpt.schedule_free_adamw(0.02, weight_decay=0.1)
    step = fgpt.make_step(objective, optimizer)
    starts = [fgpt.lora(BASE, fgpt.key(i), 2) for i in range(3)]
    states = vmap(lambda a: fgpt.init_state(a, optimizer))(fgpt.stack_adapters(starts))
    for _ in range(3):
        states, _ = vmap(lambda s: step(s, BASE, [BATCH], None))(states)
    averages = vmap(lambda s: optimizer.evaluation_params(s.opt_state, s.trainable))(states)
    for got, start in zip(fgpt.unstack_adapters(averages), starts, strict=True):
        state = fgpt.init_state(start, optimizer)
        for _ in range(3):
            state, _ = step(state, BASE, [BATCH], None)
        close(got, optimizer.evaluation_params(state.opt_state, state.trainable), 2e-5)


def test_a_sweep_over_its_numbers():
    steps = [gradients(step) for step in range(1, 4)]

    def end(numbers: Tensor) -> Any:
        lr, beta1, decay, root = numbers
        optimizer = fgpt.schedule_free_adamw(constant_schedule(lr, 3), (beta1, 0.99), weight_decay=decay, eps_root=root)
        params, state = TREE, optimizer.init(TREE)
        for grads in steps:
            params, state = optimizer.update(grads, state, params)
        return optimizer.evaluation_params(state, params)

    rows = torch.tensor([[0.01, 0.9, 0.0, 0.0], [0.05, 0.95, 0.1, 1e-4], [0.0, 0.9, 0.1, 0.0]], dtype=torch.float64)
    swept = vmap(end)(rows)
    for i, row in enumerate(rows):
        close(tree_map(lambda x, i=i: x[i], swept), end(row), 1e-9)
    close(tree_map(lambda x: x[2], swept), TREE, 1e-12)  # a rate of 0 moves nothing


def test_a_step_has_derivatives():
    target = TREE["w"] * 0.3

    def end(at: Tensor) -> Tensor:
        optimizer = fgpt.schedule_free_adamw(at[0], (at[1], 0.99), eps_root=1e-4)
        params = {"w": TREE["w"] + at[2]}
        state = optimizer.init(params)
        for _ in range(2):
            params, state = optimizer.update({"w": params["w"] - target}, state, params)
        return optimizer.evaluation_params(state, params)["w"].square().sum()

    at = torch.tensor([0.1, 0.9, 0.05], dtype=torch.float64)
    got = grad(end)(at)
    for i in range(3):
        v = torch.eye(3, dtype=torch.float64)[i]
        slope = (end(at + 1e-5 * v) - end(at - 1e-5 * v)) / 2e-5
        assert float(got[i]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)
        assert float(jvp(end, (at,), (v,))[1]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


def test_a_fresh_lora_has_derivatives():
    optimizer, start = fgpt.schedule_free_adamw(0.05, eps_root=1e-8), fgpt.lora(BASE, fgpt.key(0), 2)
    step = fgpt.make_step(objective, optimizer)

    def end(adapters: Any) -> Tensor:
        state, _ = step(fgpt.init_state(adapters, optimizer), BASE, [BATCH], None)
        return fgpt.loss(fgpt.adapt(BASE, optimizer.evaluation_params(state.opt_state, state.trainable)), BATCH)

    assert all(x.isfinite().all() for x in leaves(grad(end)(start)).values())


def test_arguments_are_not_written_to():
    optimizer, grads = fgpt.schedule_free_adamw(0.1, weight_decay=0.1), gradients(1)
    state = optimizer.init(TREE)
    before = tree_map(torch.clone, (TREE, grads, state))
    optimizer.update(grads, state, TREE)
    assert same((TREE, grads, state), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"betas": (0.0, 0.99)}, "beta 1 of schedule-free AdamW is 0.0: expected a number above 0 and below 1"),
        ({"decay": "("}, "is not a regular expression"),
        ({"lr_multipliers": {"none": 2.0}}, "lr_multipliers 'none' matches none of w, b"),
    ],
)
def test_bad_options(options: Any, says: str):
    with pytest.raises(fgpt.InputError, match=says):
        fgpt.schedule_free_adamw(0.1, **options).init(TREE)
