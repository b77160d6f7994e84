"""Derivatives of a whole training: beside finite differences in fp64, beside one graph of all steps, and by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import close, tiny, with_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

import fgpt
from fgpt.adapter_dora import with_norms
from fgpt.adapters import dora_norms
from fgpt.optim import Optimizer
from fgpt.train_step import State
from fgpt.transforms.unroll import Unrolled, metagradient, unroll
from fgpt.tree import astype, tree_leaves, tree_map

NUM_ROWS, NUM_STEPS = 6, 5
TEXT = torch.randint(0, 31, (NUM_ROWS, 8), generator=fgpt.key(3))
ROWS = fgpt.Batch(TEXT[:, :-1], TEXT[:, 1:], torch.ones(NUM_ROWS, 7, dtype=torch.float64))
QUERY = replace(ROWS, tokens=TEXT[:2, 1:], targets=TEXT[:2, :-1], weights=ROWS.weights[:2])
BASE = astype(tiny(), torch.float64)
ADAPTERS = astype(fgpt.lora(BASE, fgpt.key(1), 2, target=r".*\.(q|down)"), torch.float64)
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda lr: fgpt.adamw(lr, eps_root=1e-6, weight_decay=0.01),
    "schedule-free": lambda lr: fgpt.schedule_free_adamw(lr, eps_root=1e-6),
}


def loss(adapters: Any, base: Any, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(base, adapters, rng=seed), batch)


def training(make_optimizer: Callable[[Any], Optimizer], base: Any = BASE) -> Callable[[State, int, Any], State]:
    """Two micro-batches a step; η are the weights of the rows and the learning rates of the steps."""

    def advance(state: State, t: int, meta: dict[str, Tensor]) -> State:
        step = fgpt.make_step(loss, make_optimizer(lambda count: meta["lrs"][t]), max_norm=0.5)
        indices = [[(2 * t) % NUM_ROWS], [(2 * t + 3) % NUM_ROWS, (3 * t + 1) % NUM_ROWS]]
        batches = [
            fgpt.Batch(TEXT[i, :-1], TEXT[i, 1:], (ROWS.weights[i] * meta["rows"][i][:, None]).to(meta["rows"].dtype))
            for i in indices
        ]
        return step(state, base, batches, fgpt.fold_in(fgpt.key(5), t))[0]

    return advance


def metaparameters() -> dict[str, Tensor]:
    weights = 0.5 + torch.rand(NUM_ROWS, generator=fgpt.key(8), dtype=torch.float64)
    return {"rows": weights, "lrs": torch.full((NUM_STEPS,), 0.02, dtype=torch.float64)}


def query_loss(adapters: Any, base: Any = BASE) -> Tensor:
    return fgpt.loss(fgpt.adapt(base, adapters), QUERY)


def final_loss(advance: Any, start: State, meta: Any) -> float:
    state = start
    for t in range(NUM_STEPS):
        state = advance(state, t, meta)
    return float(query_loss(state.trainable))


def along(meta: dict[str, Tensor], name: str, size: float) -> tuple[Callable[[float], dict[str, Tensor]], Tensor]:
    direction = size * torch.randn(len(meta[name]), generator=fgpt.key(6), dtype=torch.float64)
    return lambda h: meta | {name: meta[name] + h * direction}, direction


def slope(fn: Callable[[float], float], h: float = 1e-3) -> float:
    """fn'(0) by seven points: the error is of the sixth order."""
    ends = [fn(i * h) - fn(-i * h) for i in (1, 2, 3)]
    return (45 * ends[0] - 9 * ends[1] + ends[2]) / (60 * h)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivatives_are_those_of_finite_differences(name: str):
    """By weights of rows, learning rates of steps and initial adapters, with dropout, decay, clipping and two
    micro-batches.
    """
    fresh = fgpt.lora(BASE, fgpt.key(1), 2, target=r".*\.(q|down)", dropout=0.2)
    adapters = with_noise(astype(fresh, torch.float64))
    advance, meta = training(OPTIMIZERS[name]), metaparameters()
    optimizer = OPTIMIZERS[name](0.02)
    start = fgpt.init_state(adapters, optimizer)
    result = unroll(advance, start, meta, NUM_STEPS)
    got = metagradient(advance, result, meta, grad(query_loss)(result.final.trainable))
    for key, size in (("rows", 0.1), ("lrs", 0.002)):
        at, direction = along(meta, key, size)
        expected = slope(lambda h, at=at: final_loss(advance, start, at(h)))
        assert abs(expected) > 1e-4
        assert float(got.meta[key] @ direction) == pytest.approx(expected, abs=1e-8)
    by_initial = got.initial.trainable
    directions = tree_map(lambda x: 0.01 * x, with_noise(tree_map(torch.zeros_like, adapters), seed=4))

    def from_near(h: float) -> float:
        """With other params and the same moments."""
        nearby = tree_map(lambda x, d: x + h * d, adapters, directions)
        return final_loss(advance, replace(start, trainable=nearby), meta)

    products = [(x * y).sum() for x, y in zip(tree_leaves(by_initial), tree_leaves(directions), strict=True)]
    assert float(sum(products)) == pytest.approx(slope(from_near), abs=1e-8)


@pytest.mark.slow
@settings(max_examples=5)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([None, 1, 2]))
def test_segments_and_cotangents_change_nothing(steps: int, every: int, chunk_size: int | None):
    """Beside one graph of all steps; of several functions at once."""
    optimizer, advance, meta = OPTIMIZERS["adamw"](0.02), training(OPTIMIZERS["adamw"]), metaparameters()
    start = fgpt.init_state(ADAPTERS, optimizer)
    result = unroll(advance, start, meta, steps, checkpoint_every=every)
    cotangents = tree_map(lambda x: torch.randn(3, *x.shape, generator=fgpt.key(2), dtype=x.dtype), ADAPTERS)
    got = metagradient(advance, result, meta, cotangents, chunk_size=chunk_size)

    def final(meta: Any) -> Any:
        state = start
        for t in range(steps):
            state = advance(state, t, meta)
        return state.trainable

    _, pull = torch.func.vjp(final, meta)
    close(got.meta, vmap(lambda u: pull(u)[0])(cotangents), 1e-10)
    one = metagradient(advance, result, meta, tree_map(lambda x: x[1], cotangents))
    close(one.meta, tree_map(lambda x: x[1], got.meta), 1e-12)
    assert len(result.checkpoints) == -(-steps // every)


def test_norms_of_a_dora_are_constants_of_a_gradient_and_not_of_a_training():
    """They are, where `prepare` computes them. Over a base in 4 bits, too, whose products are fp32."""
    base = fgpt.quantize(tiny(d_model=64, d_mlp=64), "nf4")
    adapters = with_noise(fgpt.dora(base, fgpt.key(1), 2), std=0.05)
    optimizer = Optimizer(
        lambda params: (), lambda g, state, params: (tree_map(lambda x, y: x - 0.3 * y, params, g), ())
    )

    def dora_loss(adapters: Any, constants: Any, batch: fgpt.Batch, seed: None) -> tuple[Tensor, Tensor]:
        base, norms = constants
        return fgpt.nll(fgpt.adapt(base, with_norms(adapters, norms)), batch)

    step = fgpt.make_step(dora_loss, optimizer, prepare=lambda tuned, frozen: (frozen, dora_norms(frozen, tuned)))
    batch = replace(ROWS, weights=ROWS.weights.float())

    def advance(state: State, t: int, scale: Tensor) -> State:
        return step(state, base, [batch], None)[0]

    start = fgpt.init_state(adapters, optimizer)
    result = unroll(advance, start, torch.ones(()), 3)
    query = replace(QUERY, weights=QUERY.weights.float())

    def ending(adapters: Any) -> Tensor:
        return fgpt.loss(fgpt.adapt(base, with_norms(adapters, dora_norms(base, adapters))), query)

    got = metagradient(advance, result, torch.ones(()), grad(ending)(result.final.trainable)).initial.trainable
    path = "blocks.0.mlp.down"
    direction = with_noise(tree_map(torch.zeros_like, adapters[path].lora.b), seed=4)

    def from_near(h: float) -> float:
        near = replace(adapters[path], lora=replace(adapters[path].lora, b=adapters[path].lora.b + h * direction))
        return float(
            ending(
                unroll(advance, replace(start, trainable=adapters | {path: near}), torch.ones(()), 3).final.trainable
            )
        )

    assert float((got[path].lora.b * direction).sum()) == pytest.approx(slope(from_near, 0.02), rel=2e-3)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_over_a_quantized_base_in_fp32(quantize: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fgpt.kernels.quantized_linear.HAS_BF16_MATMUL", False)  # derivatives are then not rounded
    base = fgpt.quantize(tiny(d_model=64, d_mlp=64), quantize)
    adapters = with_noise(fgpt.lora(base, fgpt.key(1), 2))
    optimizer, advance = OPTIMIZERS["adamw"](0.01), training(OPTIMIZERS["adamw"], base)
    meta = tree_map(lambda x: x.float(), metaparameters())
    start = fgpt.init_state(adapters, optimizer)
    result = unroll(advance, start, meta, 3)
    got = metagradient(advance, result, meta, grad(query_loss)(result.final.trainable, base)).meta

    def final(meta: Any) -> Tensor:
        state = start
        for t in range(3):
            state = advance(state, t, meta)
        return query_loss(state.trainable, base)

    close(got, grad(final)(meta), 1e-4)


def test_a_plain_adamw_has_no_derivative_at_a_fresh_lora():
    advance, meta = training(fgpt.adamw), metaparameters()
    result = unroll(advance, fgpt.init_state(ADAPTERS, fgpt.adamw(0.02)), meta, 3)
    with pytest.raises(fgpt.InputError, match="eps_root"):
        metagradient(advance, result, meta, grad(query_loss)(result.final.trainable))


def test_wrong_arguments():
    advance, meta = training(OPTIMIZERS["adamw"]), metaparameters()
    start = fgpt.init_state(ADAPTERS, OPTIMIZERS["adamw"](0.02))
    with pytest.raises(fgpt.InputError, match="0 steps"):
        unroll(advance, start, meta, 0)
    result: Unrolled = unroll(advance, start, meta, 2)
    with pytest.raises(fgpt.InputError, match=r"has nothing at blocks.0.attn.q/a"):
        metagradient(advance, result, meta, {})
    wrong = tree_map(lambda x: x[:1], ADAPTERS)
    with pytest.raises(fgpt.InputError, match=r"has shape \[1, 16\] at blocks.0.attn.q/a and the final params shape"):
        metagradient(advance, result, meta, wrong)
