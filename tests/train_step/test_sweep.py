"""A sweep trains each member as it would be trained alone, to rounding: rates, decay, ranks, strengths, dropout, data
orders of their own, over plain and quantized bases.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import close, same, tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fgpt
from fgpt.errors import InputError
from fgpt.optim_muon import muon
from fgpt.optim_schedule_free import schedule_free_adamw
from fgpt.sweeps import stack_batches, stack_states, sweep_step, take_members, unstack_states
from fgpt.tree import leaves

GPT = tiny()
QV = r"blocks\..*\.(q|v|up)"


def objective(adapters: Any, params: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)


def packed_batch(rows: int, width: int, documents: int, seed: int) -> fgpt.Batch:
    """Rows of several documents and some padding, with loss on a third of the positions."""
    rng = fgpt.key(seed)
    text = tokens(31, rows, width + 1, seed=seed)
    ends = torch.sort(torch.randint(1, width, (rows, documents), generator=rng), 1).values
    bounds = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), ends, torch.full((rows, 1), width)], 1)
    position = torch.arange(width)
    segments = 1 + (position[None, :, None] >= ends[:, None, :]).sum(-1)
    segments[segments == documents + 1] = 0  # what follows the last document is padding
    weights = (torch.rand(rows, width, generator=rng) < 0.3).float() * (segments > 0)
    weights[:, 0] = 1.0
    positions = weights.flatten().nonzero().flatten()
    batch = fgpt.Batch(text[:, :-1], text[:, 1:], weights, segments, positions, bounds.int())
    if documents == 1:  # as `collate` leaves it: a row is one document, whatever padding follows it
        return replace(batch, segments=None, cu_seqlens=None)
    return replace(batch, cu_seqlens=None) if documents == 2 and seed % 5 == 4 else batch


def orders(steps: int, members: int) -> list[list[list[fgpt.Batch]]]:
    """Batches of other rows, widths and numbers for each member of each step."""
    return [
        [
            [packed_batch(1 + (i + j + k) % 3, 8 + (i + j) % 2 * 4, 2, 100 * i + 10 * j + k) for k in range(1 + j % 2)]
            for j in range(members)
        ]
        for i in range(steps)
    ]


OPTIMIZERS: dict[str, Any] = {
    "adamw": fgpt.adamw,
    "adamw8bit": fgpt.adamw8bit,
    "muon": muon,
    "schedule_free_adamw": schedule_free_adamw,
}


def members(kind: str, params: fgpt.GPT, dropout: float = 0.0) -> list[Any]:
    if kind == "leaves":
        return [fgpt.trainable_leaves(params, r"blocks\..*\.ln_.*") for _ in range(3)]
    make = fgpt.lora if kind == "lora" else fgpt.dora
    return [
        make(params, fgpt.key(i), rank, alpha, QV, rs=i == 1, dropout=dropout)
        for i, (rank, alpha) in enumerate([(2, 8), (4, 3), (3, 16)])
    ]


@pytest.mark.parametrize("quantized", [None, "nf4", "int8"])
@pytest.mark.parametrize("kind", ["lora", "dora", "leaves"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_each_member_is_its_training_alone(kind: str, name: str, quantized: Any):
    if quantized and name != "adamw":
        pytest.skip("the optimizer does not see the base")
    params = GPT if quantized is None else fgpt.quantize(tiny(d_model=64, d_mlp=64), quantized)
    lrs, decays = torch.tensor([1e-2, 3e-3, 1e-3]), torch.tensor([0.0, 0.1, 0.5])
    starts = members(kind, params)
    rngs, batches = [fgpt.key(10 + i) for i in range(3)], orders(4, 3)
    make = OPTIMIZERS[name]
    states = [fgpt.init_state(x, make(0.0)) for x in starts]

    result = fgpt.sweep(
        lambda h: fgpt.make_step(objective, make(h["lr"], weight_decay=h["decay"])),
        states,
        params,
        batches,
        optimizer=make(0.0),
        hyperparameters={"lr": lrs, "decay": decays},
        rngs=rngs,
    )
    for i, start in enumerate(starts):
        optimizer = make(float(lrs[i]), weight_decay=float(decays[i]))
        step, state, losses = fgpt.make_step(objective, optimizer), fgpt.init_state(start, optimizer), []
        for t, of_step in enumerate(batches):
            state, metrics = step(state, params, of_step[i], fgpt.fold_in(rngs[i], t))
            losses.append(metrics.loss)
        close(result.losses[i], torch.stack(losses), 2e-2 if quantized == "int8" else 1e-5)
        if quantized != "int8":  # which rounds inputs to integers, and a difference of 1e-7 may move one to the next
            close(result.states[i], state, 3e-4)
        assert leaves(result.states[i]).keys() == leaves(state).keys()
        assert int(result.states[i].step) == len(batches)
        assert not same(result.states[i].trainable, start)


def test_members_have_dropout_of_their_own():
    """Equal batches and other keys: the dropout of each is that of its training alone."""
    starts, rngs = members("lora", GPT, dropout=0.5), [fgpt.key(i) for i in range(3)]
    batch = packed_batch(2, 8, 2, 0)
    optimizer = fgpt.adamw(1e-2)
    result = fgpt.sweep(
        lambda h: fgpt.make_step(objective, fgpt.adamw(h["lr"])),
        [fgpt.init_state(x, optimizer) for x in starts],
        GPT,
        [[[batch]] * 3] * 3,
        optimizer=optimizer,
        hyperparameters={"lr": torch.full((3,), 1e-2)},
        rngs=rngs,
    )
    for i, start in enumerate(starts):
        state, step = fgpt.init_state(start, optimizer), fgpt.make_step(objective, optimizer)
        for t in range(3):
            state, _ = step(state, GPT, [batch], fgpt.fold_in(rngs[i], t))
        close(result.states[i].trainable, state.trainable, 5e-4)


@settings(max_examples=30)
@given(st.data())
def test_stacked_batches_have_the_losses_of_each(data: st.DataObject):
    """Filled up to one shape: positions, loss positions, documents and whole micro-batches weigh nothing."""
    count = data.draw(st.integers(1, 3))
    own = [
        [
            packed_batch(
                data.draw(st.integers(1, 3)),
                data.draw(st.integers(5, 12)),
                data.draw(st.integers(1, 3)),
                data.draw(st.integers(0, 9)),
            )
            for k in range(data.draw(st.integers(1, 2)))
        ]
        for _ in range(count)
    ]
    stacked = stack_batches(own)
    assert len(stacked) == max(map(len, own))
    for i, batches in enumerate(own):
        parts = [fgpt.nll(GPT, fgpt.tree.tree_map(lambda x, i=i: x[i], batch)) for batch in stacked]
        expected = [fgpt.nll(GPT, batch) for batch in batches]
        for part, whole in zip(parts, expected, strict=False):
            close(part[0], whole[0], 1e-4)
            assert part[1] == whole[1]
        for value, weight in parts[len(batches) :]:
            assert (float(value), float(weight)) == (0.0, 0.0)


def test_bounds_and_segments_of_documents_are_one_thing():
    """A batch with bounds alone beside one with segments alone."""
    batch = packed_batch(1, 8, 3, 0)
    by_bounds, by_segments = replace(batch, segments=None), replace(batch, cu_seqlens=None)
    (stacked,) = stack_batches([[by_bounds], [by_segments]])
    for i in range(2):
        close(fgpt.nll(GPT, fgpt.tree.tree_map(lambda x, i=i: x[i], stacked))[0], fgpt.nll(GPT, batch)[0], 1e-5)


def test_a_mapped_step_needs_no_recording():
    """Under no_grad, and with a loss that draws numbers of its own."""
    optimizer, batch = fgpt.adamw(1e-2), packed_batch(2, 8, 1, 0)
    states = stack_states([fgpt.init_state(x, optimizer) for x in members("lora", GPT)], optimizer)
    step = fgpt.make_step(objective, optimizer)
    expected, _ = torch.func.vmap(lambda s: step(s, GPT, [batch]))(states)
    with torch.no_grad():
        got, _ = torch.func.vmap(lambda s: step(s, GPT, [batch]))(states)
    assert same(got, expected)

    def noisy(adapters: Any, params: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        total, weight = objective(adapters, params, batch, seed)
        return total * (1 + torch.rand(())), weight

    random_step = fgpt.make_step(noisy, optimizer)
    _, metrics = torch.func.vmap(lambda s: random_step(s, GPT, [batch]), randomness="different")(states)
    assert len({float(x) for x in metrics.grad_norm}) == 3


def test_unstacked_states_are_those_that_were_stacked():
    """To the bit, at any step, for every optimizer; and one of them can be taken out."""
    for make in OPTIMIZERS.values():
        states = [fgpt.init_state(x, make(1e-2)) for x in members("lora", GPT)]
        states = [fgpt.make_step(objective, make(1e-2))(s, GPT, [packed_batch(1, 8, 2, 0)], None)[0] for s in states]
        stacked = stack_states(states, make(0.0))
        for x, y in zip(unstack_states(stacked, states), states, strict=True):
            assert same(x, y)
        (last,) = unstack_states(take_members(stacked, [2]), states[2:])
        assert same(last, states[2])


def test_a_member_that_diverges_leaves_the_others_as_they_are():
    starts = members("lora", GPT)
    optimizer, batch = fgpt.adamw(0.0), packed_batch(2, 8, 2, 0)

    def losses(lrs: list[float]) -> Tensor:
        return fgpt.sweep(
            lambda h: fgpt.make_step(objective, fgpt.adamw(h["lr"])),
            [fgpt.init_state(x, optimizer) for x in starts],
            GPT,
            [[[batch]] * 3] * 4,
            optimizer=optimizer,
            hyperparameters={"lr": torch.tensor(lrs)},
        ).losses

    broken = losses([1e-2, float("inf"), 1e-3])
    assert broken[1].isnan().any()
    assert torch.equal(broken[[0, 2]], losses([1e-2, 1e-2, 1e-3])[[0, 2]])


@pytest.mark.parametrize("by", ["autograd", "grad"])
def test_a_mapped_step_can_be_differentiated(by: str):
    """Each member's loss after a step, in its own rate: a metagradient, by plain autograd around vmap or by grad."""
    batch, starts = packed_batch(2, 8, 1, 0), members("lora", GPT)
    optimizer = fgpt.adamw(0.0, eps_root=1e-8)

    def after(lrs: Tensor) -> Tensor:
        step = sweep_step(lambda h: fgpt.make_step(objective, fgpt.adamw(h["lr"], eps_root=1e-8)))
        states = stack_states([fgpt.init_state(x, optimizer) for x in starts], optimizer)
        for _ in range(2):
            states, metrics = step(states, GPT, stack_batches([[batch]] * 3), None, {"lr": lrs})
        return metrics.loss.sum()

    lrs = torch.tensor([1e-2, 3e-3, 1e-3])
    if by == "grad":
        got = torch.func.grad(after)(lrs)
    else:
        (got,) = torch.autograd.grad(after(inputs := lrs.clone().requires_grad_()), inputs)
    for i, start in enumerate(starts):

        def alone(lr: Tensor, start: Any = start) -> Tensor:
            step = fgpt.make_step(objective, fgpt.adamw(lr, eps_root=1e-8))
            state = fgpt.init_state(start, optimizer)
            for _ in range(2):
                state, metrics = step(state, GPT, [batch], None)
            return metrics.loss

        expected = torch.func.grad(alone)(lrs[i])
        assert abs(float(expected)) > 1e-3
        assert float(got[i]) == pytest.approx(float(expected), rel=1e-3)


def test_no_call_of_a_step_falls_back_to_one_member_after_the_other(recwarn: pytest.WarningsRecorder):
    """torch warns of a performance drop where it has no batching rule."""
    optimizer = fgpt.adamw(1e-2)
    step = sweep_step(lambda h: fgpt.make_step(objective, fgpt.adamw(h["lr"])))
    for kind in ("lora", "dora"):
        states = stack_states([fgpt.init_state(x, optimizer) for x in members(kind, GPT, dropout=0.1)], optimizer)
        for own in orders(1, 3):
            step(states, GPT, stack_batches(own), torch.arange(3), {"lr": torch.full((3,), 1e-2)})
    assert not [w for w in recwarn if "performance" in str(w.message) or "batching rule" in str(w.message)]


def test_batches_that_cannot_be_filled_up_are_refused():
    """A pair counts in the loss of its row, so that an empty pair would count."""
    from fgpt.objectives.pairs import PairBatch

    def pairs(count: int, width: int = 8) -> PairBatch:
        return PairBatch(packed_batch(2 * count, width, 2, 0), torch.zeros(2 * count))

    with pytest.raises(InputError, match="other rows"):
        stack_batches([[pairs(1)], [pairs(2)]])
    with pytest.raises(InputError, match="micro-batches"):
        stack_batches([[pairs(1)], [pairs(1), pairs(1)]])
    stacked = stack_batches([[pairs(2)], [pairs(2, width=12)]])[0]
    assert stacked.batch.tokens.shape == (2, 4, 12)
    assert stacked.reference is not None
    assert stacked.reference.shape == (2, 4)
