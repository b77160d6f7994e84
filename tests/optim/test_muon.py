"""Muon is torch's and its author's, matrix by matrix, beside AdamW for the other leaves."""

from typing import Any

import pytest
import torch
from builders import close, same, tiny, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.kernels.newton_schulz import orthogonalize, reference
from fgpt.optim import cosine_schedule
from fgpt.tree import leaves, tree_map

SHAPES = {"wide": (3, 8), "tall": (9, 4), "also_wide": (3, 8), "square": (5, 5), "b": (4,), "wte.w": (11, 4)}
TREE = {
    name: torch.randn(shape, generator=fgpt.key(i), dtype=torch.float64)
    for i, (name, shape) in enumerate(SHAPES.items())
}
MATRICES = ["wide", "tall", "also_wide", "square"]


def gradients(step: int) -> dict[str, Tensor]:
    """Of very unequal sizes, and zero in every seventh step."""
    rng = fgpt.key(100 + step)
    return {
        name: (step % 7) * 10.0 ** (i - 3) * torch.randn(x.shape, generator=rng, dtype=torch.float64)
        for i, (name, x) in enumerate(TREE.items())
    }


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("nesterov", "decay", "momentum"), [(True, 0.0, 0.95), (True, 0.1, 0.9), (False, 0.1, 0.95)])
def test_muon_is_torchs(adjust_lr: Any, nesterov: bool, decay: float, momentum: float, monkeypatch: Any):
    """torch rounds to bfloat16 before it iterates; here it iterates in float64, as we do."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.double().clone())  # it divides the copy in place
    hf = {name: x.clone().requires_grad_() for name, x in TREE.items()}
    references = [
        torch.optim.Muon(
            [hf[name] for name in MATRICES],
            lr=0.02,
            weight_decay=decay,
            momentum=momentum,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr,
        ),
        torch.optim.AdamW([hf["b"]], lr=0.02, weight_decay=0.0),
        torch.optim.AdamW([hf["wte.w"]], lr=0.02, weight_decay=decay),
    ]
    optimizer = fgpt.muon(0.02, momentum, nesterov=nesterov, weight_decay=decay, adjust_lr=adjust_lr)
    params, state = TREE, optimizer.init(TREE)
    for step in range(50):
        grads = gradients(step)
        for name, x in hf.items():
            x.grad = grads[name].clone()
        for each in references:
            each.step()
        params, state = optimizer.update(grads, state, params)
        close(params, {name: x.detach() for name, x in hf.items()}, 1e-9)
    assert state.adam.count == 50
    assert sorted(state.momentum) == sorted(MATRICES)


def by_hand(theta: Tensor, grads: list[Tensor], lr: float, beta: float) -> Tensor:
    """The author's update, written from his article, one matrix at a time: momentum, quintic, scale of the shape."""
    m = torch.zeros_like(theta)
    for g in grads:
        m = beta * m + (1 - beta) * g
        update = beta * m + (1 - beta) * g
        x = update / (update.norm() + 1e-7)
        if x.shape[0] > x.shape[1]:
            x = x.T
        for _ in range(5):
            x = 3.4445 * x + (-4.7750 * (x @ x.T) + 2.0315 * (x @ x.T) @ (x @ x.T)) @ x
        if theta.shape[0] > theta.shape[1]:
            x = x.T
        theta = theta - lr * max(1, theta.shape[0] / theta.shape[1]) ** 0.5 * x
    return theta


@pytest.mark.parametrize("name", MATRICES)
def test_muon_is_its_authors(name: str):
    optimizer = fgpt.muon(0.05, adjust_lr="original")
    steps = [gradients(step) for step in range(1, 51) if step % 7]
    params, state = TREE, optimizer.init(TREE)
    for grads in steps:
        params, state = optimizer.update(grads, state, params)
    close(params[name], by_hand(TREE[name], [grads[name] for grads in steps], 0.05, 0.95), 1e-4)


def test_in_bfloat16_torchs_is_as_near_as_its_rounding():
    hf = TREE["wide"].float().requires_grad_()
    reference_optimizer = torch.optim.Muon([hf], lr=0.02, weight_decay=0.0)
    tree = {"wide": TREE["wide"].float()}
    optimizer = fgpt.muon(0.02, adjust_lr="original")
    params, state = tree, optimizer.init(tree)
    for step in range(1, 6):
        hf.grad = gradients(step)["wide"].float()
        reference_optimizer.step()
        params, state = optimizer.update({"wide": gradients(step)["wide"].float()}, state, params)
    assert (params["wide"] - hf.detach()).norm() < 0.02 * (hf.detach() - tree["wide"]).norm()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9), st.floats(1e-3, 1e3))
def test_singular_values_come_near_1_and_vectors_stay(out: int, inp: int, seed: int, size: float):
    g = size * torch.randn(out, inp, generator=fgpt.key(seed), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    (x,) = orthogonalize([g], 5)
    inside = u.T @ x @ vh.T
    assert (inside - inside.diag().diag()).abs().max() < 1e-6
    large = s / s.norm() > 0.05  # the iterations have not reached the others yet
    assert ((inside.diag()[large] - 0.95).abs() < 0.3).all()


def test_of_nothing_it_is_nothing():
    assert same(orthogonalize([torch.zeros(3, 4)], 5), [torch.zeros(3, 4)])


def test_matrices_of_one_shape_in_one_product_are_each_alone():
    gs = [torch.randn(3, 8, generator=fgpt.key(i)) for i in range(4)] + [torch.randn(8, 3, generator=fgpt.key(9))]
    close(orthogonalize(gs, 5), [reference(g, 5) for g in gs], 1e-6)


# ------------------------------------------------------------------------------------------------------- transforms

BASE = tiny(n_layer=1)
BATCH = fgpt.Batch(tokens(31, 2, 8), tokens(31, 2, 8, seed=1), torch.ones(2, 8))


def objective(adapters: Any, params: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters), batch)


def members(n: int) -> list[fgpt.Adapters]:
    return [fgpt.lora(BASE, fgpt.key(i), 2) for i in range(n)]


def test_a_stack_under_vmap_is_its_members():
    """Matrices [N, r, d] are N matrices: none is orthogonalized together with another's."""
    optimizer = fgpt.muon(0.05, weight_decay=0.1)
    step = fgpt.make_step(objective, optimizer)
    states = vmap(lambda a: fgpt.init_state(a, optimizer))(fgpt.stack_adapters(members(3)))
    for _ in range(3):
        states, _ = vmap(lambda s: step(s, BASE, [BATCH], None))(states)
    for got, start in zip(fgpt.unstack_adapters(states.trainable), members(3), strict=True):
        state = fgpt.init_state(start, optimizer)
        for _ in range(3):
            state, _ = step(state, BASE, [BATCH], None)
        close(got, state.trainable, 2e-5)


def test_a_sweep_over_rate_momentum_and_decay():
    steps = [gradients(step) for step in range(1, 4)]

    def end(numbers: Tensor) -> Any:
        lr, momentum, decay = numbers
        optimizer = fgpt.muon(cosine_schedule(lr, 5), momentum, weight_decay=decay)
        params, state = TREE, optimizer.init(TREE)
        for grads in steps:
            params, state = optimizer.update(grads, state, params)
        return params

    rows = torch.tensor([[0.01, 0.9, 0.0], [0.05, 0.95, 0.1]], dtype=torch.float64)
    swept = vmap(end)(rows)
    for i, row in enumerate(rows):
        close(tree_map(lambda x, i=i: x[i], swept), end(row), 1e-9)


def test_a_step_has_derivatives():
    """By the rate and by the start, through two steps, against finite differences."""
    target = TREE["wide"] * 0.3

    def end(at: Tensor) -> Tensor:
        optimizer = fgpt.muon(at[0], at[1])
        params = {"wide": TREE["wide"] + at[2], "b": TREE["b"] + at[3]}
        state = optimizer.init(params)
        for _ in range(2):
            grads = {"wide": params["wide"] - target, "b": params["b"] ** 2}
            params, state = optimizer.update(grads, state, params)
        return sum(x.square().sum() for x in params.values())  # pyright: ignore

    at = torch.tensor([0.1, 0.9, 0.05, 0.02], dtype=torch.float64)
    got = grad(end)(at)
    for i in range(4):
        v = 1e-5 * torch.eye(4, dtype=torch.float64)[i]
        slope = (end(at + v) - end(at - v)) / 2e-5
        assert float(got[i]) == pytest.approx(float(slope), rel=1e-5)
        assert float(jvp(end, (at,), (v / 1e-5,))[1]) == pytest.approx(float(slope), rel=1e-5)


def test_a_fresh_lora_has_derivatives():
    """The gradient of every A is 0 in the first step, where a norm has no derivative: ours is 0."""
    optimizer, start = fgpt.muon(0.05, eps=1e-6), members(1)[0]
    step = fgpt.make_step(objective, optimizer)

    def end(adapters: Any) -> Tensor:
        state, _ = step(fgpt.init_state(adapters, optimizer), BASE, [BATCH], None)
        return fgpt.loss(fgpt.adapt(BASE, state.trainable), BATCH)

    assert all(x.isfinite().all() for x in leaves(grad(end)(start)).values())


def test_arguments_are_not_written_to():
    optimizer, grads = fgpt.muon(0.1), gradients(1)
    state = optimizer.init(TREE)
    before = tree_map(torch.clone, (TREE, grads, state))
    optimizer.update(grads, state, TREE)
    assert same((TREE, grads, state), before)


def test_multipliers_are_of_both_kinds_of_leaves():
    grads = gradients(1)
    plain, many = fgpt.muon(0.1), fgpt.muon(0.1, lr_multipliers={"tall|b": 4.0})
    once, _ = plain.update(grads, plain.init(TREE), TREE)
    more, _ = many.update(grads, many.init(TREE), TREE)
    for name, x in TREE.items():
        close(more[name] - x, (4 if name in ("tall", "b") else 1) * (once[name] - x), 1e-9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"matrices": "("}, "is not a regular expression"),
        ({"lr_multipliers": {"none": 2.0}}, "lr_multipliers 'none' matches none of wide"),
        ({"lr_multipliers": {"b": -1.0}}, "expected a number of 0 or more"),
    ],
)
def test_bad_options(options: Any, says: str):
    with pytest.raises(fgpt.InputError, match=says):
        fgpt.muon(0.1, **options).init(TREE)
