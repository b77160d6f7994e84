"""Steps that are pure and add up micro-batches."""

import itertools
from typing import Any

import torch
from builders import close, same, tiny, tokens, with_noise
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

import fgpt
from fgpt.adapter_dora import with_norms
from fgpt.adapters import dora_norms
from fgpt.optim import global_norm
from fgpt.tree import astype, leaves, tree_map
from fgpt.weights import Adapted

# --------------------------------------------------------------------------------------------------------------- steps


GPT = tiny(n_layer=1)
ADAPTERS: Any = with_noise(fgpt.lora(GPT, fgpt.key(0), 2), seed=1)
WEIGHTS = (
    torch.rand(6, 7, generator=fgpt.key(0)) * (torch.arange(7) < torch.tensor([[1], [7], [3], [5], [2], [6]]))
).float()
BATCH = fgpt.Batch(tokens(31, 6, 7), tokens(31, 6, 7, seed=1), WEIGHTS)
OPTIMIZER = fgpt.adamw(1e-2, weight_decay=0.1)


def objective(adapters: Any, params: Any, batch: fgpt.Batch, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters), batch)


def part(rows: list[int], width: int) -> fgpt.Batch:
    """Some rows, cut to a width that still holds all of their weight."""
    return tree_map(lambda x: x[rows, :width], BATCH)


def splits() -> st.SearchStrategy[list[list[int]]]:
    def cut(order: list[int], cuts: set[int]) -> list[list[int]]:
        edges = [0, *sorted(cuts), 6]
        return [order[a:b] for a, b in itertools.pairwise(edges)]

    return st.builds(cut, st.permutations(range(6)), st.sets(st.integers(1, 5), max_size=5))


@given(splits(), st.sampled_from([None, 0.05]))
def test_ragged_micro_batches_are_one_batch(parts: list[list[int]], most: float | None):
    step, state = fgpt.make_step(objective, OPTIMIZER, max_norm=most), fgpt.init_state(ADAPTERS, OPTIMIZER)
    state, _ = step(state, GPT, [BATCH], None)  # moments that are not zero
    micro = [part(rows, max(int((WEIGHTS[i] > 0).sum()) for i in rows)) for rows in parts]
    one, together = step(state, GPT, [BATCH], None)
    many, separate = step(state, GPT, micro, None)
    close(many, one, 1e-6)
    close(separate, together, 1e-6, 1e-6)


def test_norms_of_a_dora_computed_once_a_step():
    """The same step, to the bit, as with norms for each micro-batch; solo and mapped over members. Under vmap the norms
    are computed only once, too.
    """
    calls: list[int] = []

    def prepare(adapters: Any, params: Any) -> Any:
        calls.append(1)
        return params, dora_norms(params, adapters)

    def with_constants(adapters: Any, constants: Any, batch: fgpt.Batch, seed: Any) -> tuple[Tensor, Tensor]:
        params, norms = constants
        return fgpt.nll(fgpt.adapt(params, with_norms(adapters, norms)), batch)

    plain = fgpt.make_step(objective, OPTIMIZER)
    once = fgpt.make_step(with_constants, OPTIMIZER, prepare=prepare)
    members = [with_noise(fgpt.dora(GPT, fgpt.key(i), 2), seed=i) for i in range(2)]
    micro = [part([0, 1], 7), part([2], 3), part([3, 4, 5], 7)]
    solo = [(step(fgpt.init_state(members[0], OPTIMIZER), GPT, micro, None)) for step in (plain, once)]
    assert same(*solo)
    assert len(calls) == 1
    states = [fgpt.init_state(x, OPTIMIZER) for x in members]
    stacked = tree_map(lambda *xs: torch.stack(xs), *states)
    mapped, _ = vmap(once, in_dims=(0, None, None, None))(stacked, GPT, micro, None)
    close(tree_map(lambda x: x[0], mapped).trainable, solo[0][0].trainable, 1e-5)
    close(tree_map(lambda x: x[1], mapped).trainable, plain(states[1], GPT, micro, None)[0].trainable, 1e-5)


def test_norms_of_a_dora_are_those_of_what_it_lies_on():
    """A weight that the same tree replaces, and the head that it makes of a tied model's table."""
    q, o = "blocks.0.attn.q", "blocks.0.attn.o"
    leaf: Any = {f"{q}.w": 3 * GPT.blocks[0].attn.q.w, "wte.w": 2 * GPT.wte.w}
    head = {"head": fgpt.dora(GPT, fgpt.key(1), 2, target="wte")["wte"]}
    doras = with_noise(fgpt.dora(GPT, fgpt.key(0), 2, target=f"{q}|{o}") | head)
    norms = dora_norms(GPT, leaf | doras)
    assert list(norms) == [q, o, "head"]
    got = fgpt.adapt(GPT, with_norms(leaf | doras, norms))
    assert same(got, fgpt.adapt(GPT, leaf | doras))


def test_metrics_are_the_loss_the_norm_and_the_weight():
    _, metrics = fgpt.make_step(objective, OPTIMIZER)(fgpt.init_state(ADAPTERS, OPTIMIZER), GPT, [BATCH], None)
    expected = grad(lambda a: fgpt.loss(fgpt.adapt(GPT, a), BATCH))(ADAPTERS)
    close(metrics.loss, fgpt.loss(fgpt.adapt(GPT, ADAPTERS), BATCH), 1e-6)
    close(metrics.grad_norm, global_norm(expected), 1e-6)
    close(metrics.weight, WEIGHTS.sum(), 1e-6)


def test_a_step_is_pure():
    """The same inputs give bitwise the same result, and come out as they went in."""
    rng, world = fgpt.key(0), torch.get_rng_state()
    step, state = fgpt.make_step(objective, OPTIMIZER), fgpt.init_state(ADAPTERS, OPTIMIZER)
    state, _ = step(state, GPT, [BATCH], rng)
    inputs = (state, GPT, [BATCH])
    before = tree_map(torch.clone, inputs)
    first, second = step(*inputs, rng), step(*inputs, rng)
    assert same(first, second)
    assert same(before, inputs)
    assert torch.equal(torch.get_rng_state(), world)
    assert torch.equal(rng.get_state(), fgpt.key(0).get_state())
    assert first[0].step == state.step + 1
    assert not any(x.requires_grad for x in leaves(first).values())
    assert not same(first[0].trainable, state.trainable)


def test_training_lowers_the_loss():
    step, state = fgpt.make_step(objective, OPTIMIZER), fgpt.init_state(ADAPTERS, OPTIMIZER)
    losses = []
    for _ in range(15):
        state, metrics = step(state, GPT, [BATCH], None)
        losses.append(metrics.loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert isinstance(fgpt.adapt(GPT, state.trainable).blocks[0].attn.q.w, Adapted)


# -------------------------------------------------------------------------------------------------------------- import


def test_the_b_of_an_adapter_is_not_the_bias_beside_it(gpt: fgpt.GPT):
    """Both could be called blocks.0.attn.q.b: counted, decayed and trained apart."""
    both = fgpt.lora(gpt, fgpt.key(0), 2, target=r"blocks\.0\.attn\.q") | fgpt.trainable_leaves(
        gpt, r"blocks\.0\.attn\.q\.b"
    )
    assert fgpt.num_trainable(both) == 2 * 16 * 2 + 16
    optimizer = fgpt.adamw(1e-2, weight_decay=0.5)
    step = fgpt.make_step(objective, optimizer)
    state = fgpt.init_state(both, optimizer)
    for _ in range(2):
        state, metrics = step(state, gpt, [BATCH], None)
    moved = {path: not torch.equal(x, leaves(both)[path]) for path, x in leaves(state.trainable).items()}
    assert moved == dict.fromkeys(["blocks.0.attn.q/a", "blocks.0.attn.q/b", "blocks.0.attn.q.b"], True)
    grads = torch.func.grad(lambda a: objective(a, gpt, BATCH, None)[0])(state.trainable)
    assert len(leaves(grads)) == 3
    assert float(metrics.grad_norm) > 0
    assert astype(both, torch.bfloat16)["blocks.0.attn.q"].b.dtype == torch.bfloat16  # pyright: ignore
