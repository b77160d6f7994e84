"""Training a stack is training each of its members: strengths, ranks, dropout and rates of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import close, same, tiny, tokens, with_noise
from torch import Tensor
from torch.func import grad, vmap

import fgpt
from fgpt.optim import cosine_schedule
from fgpt.tree import leaves, tree_map

GPT = tiny()
ROWS = fgpt.Batch(tokens(31, 3, 8), tokens(31, 3, 8, seed=1), torch.rand(3, 8, generator=fgpt.key(0)))
Q, QV = r"blocks\..*\.q", r"blocks\..*\.(q|v)"


def objective(adapters: Any, params: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)


def train_alone(members: list[Any], optimizer: fgpt.Optimizer, seeds: list[Any], steps: int = 5) -> list[fgpt.Adapters]:
    """Each on its own."""
    step, ends = fgpt.make_step(objective, optimizer), []
    for member, seed in zip(members, seeds, strict=True):
        state = fgpt.init_state(member, optimizer)
        for i in range(steps):
            state, _ = step(state, GPT, [ROWS], None if seed is None else fgpt.fold_in(seed, i))
        ends.append(state.trainable)
    return ends


def trained_together(members: list[Any], optimizer: fgpt.Optimizer, seeds: Tensor | None = None, steps: int = 5) -> Any:
    """As one stack, by vmap of the same step."""
    step = fgpt.make_step(objective, optimizer)
    state = vmap(lambda a: fgpt.init_state(a, optimizer))(fgpt.stack_adapters(members))
    for i in range(steps):
        if seeds is None:
            state, _ = vmap(lambda s: step(s, GPT, [ROWS], None))(state)
        else:
            state, _ = vmap(lambda s, k, i=i: step(s, GPT, [ROWS], fgpt.fold_in(k, i)))(state, seeds)
    return state.trainable


def different_members() -> list[fgpt.Adapters]:
    """Of other ranks, strengths and targets."""
    return [
        fgpt.lora(GPT, fgpt.key(0), 2, 8, Q),
        fgpt.lora(GPT, fgpt.key(1), 4, 1, QV, rs=True),
        fgpt.lora(GPT, fgpt.key(2), 3, 16, Q) | fgpt.lora(GPT, fgpt.key(3), 1, 2, r"blocks\.0\.attn\.v"),
    ]


@pytest.mark.parametrize("start", ["fresh", "moved"])
def test_training_a_stack_is_training_each_member(start: str):
    members = different_members()
    members = members if start == "fresh" else [with_noise(x, 0.1) for x in members]
    optimizer = fgpt.adamw(cosine_schedule(1e-2, 5, warmup_steps=2), weight_decay=0.1)
    stacked = trained_together(members, optimizer)
    alone = train_alone(members, optimizer, [None] * 3)
    for got, expected, first in zip(fgpt.unstack_adapters(stacked), alone, members, strict=True):
        close(got, expected, 2e-5)
        assert max((x - y).abs().max() for x, y in zip(leaves(expected).values(), leaves(first).values())) > 1e-2
        for path, x in expected.items():
            assert isinstance(x, fgpt.LoRA)
            assert got[path].scale == pytest.approx(x.scale)  # pyright: ignore[reportAttributeAccessIssue]
    lora: Any = stacked["blocks.0.attn.q"]
    assert lora.a.shape[1] == 4
    assert not lora.a[0, 2:].any()  # what was filled in stays zero
    assert not lora.b[0, :, 2:].any()
    assert torch.equal(lora.scaling, fgpt.stack_adapters(members)["blocks.0.attn.q"].scaling)  # pyright: ignore


def test_members_alike_stack_as_they_are():
    members = [fgpt.lora(GPT, fgpt.key(i), 2, 6, QV, dropout=0.25) for i in range(2)]
    stacked = fgpt.stack_adapters(members)
    for i, member in enumerate(fgpt.unstack_adapters(stacked)):
        assert same(member, members[i])
        assert member["blocks.0.attn.q"].dropout == 0.25  # pyright: ignore
        assert member["blocks.0.attn.q"].alpha == 6  # pyright: ignore


def test_members_draw_their_own_dropout():
    """From mapped seeds, as each would alone; and from a mapped index folded into one key."""
    members = [fgpt.lora(GPT, fgpt.key(0), 2, alpha, QV, dropout=0.5) for alpha in (4, 4, 8)]
    seeds = torch.stack([fgpt.seed_tensor(fgpt.key(i)) for i in range(3)])
    optimizer = fgpt.adamw(1e-2)
    got = fgpt.unstack_adapters(trained_together(members, optimizer, seeds))
    alone = train_alone(members, optimizer, list(seeds))
    for x, y in zip(got, alone, strict=True):
        close(x, y, 2e-5)
    assert not same(got[0], got[1])

    at = with_noise(members[0], 0.1)

    def loss(i: Tensor) -> Tensor:
        return fgpt.loss(fgpt.adapt(GPT, at, rng=fgpt.fold_in(fgpt.key(0), i)), ROWS)

    each = vmap(loss)(torch.arange(5))
    assert len(set(each.tolist())) == 5
    close(each, torch.stack([loss(torch.tensor(i)) for i in range(5)]), 1e-5)


def test_seeds_fold():
    """As keys do: names and numbers give other seeds, in any order others, mapped or not the same."""
    key, seed = fgpt.key(3), fgpt.seed_tensor(fgpt.key(3))
    numbers = torch.arange(200)
    folded = vmap(lambda i: fgpt.fold_in(seed, i))(numbers)
    assert len(set(folded.tolist())) == 200
    assert folded.min() >= 0
    assert folded.max() < 2**31
    assert folded.tolist() == [int(fgpt.fold_in(seed, i)) for i in range(200)]
    assert folded.tolist() == [int(fgpt.fold_in(key, torch.tensor(i))) for i in range(200)]
    a, b = fgpt.fold_in(fgpt.fold_in(seed, "a"), "b"), fgpt.fold_in(fgpt.fold_in(seed, "b"), "a")
    assert len({int(x) for x in (a, b, seed, fgpt.fold_in(fgpt.fold_in(seed, "a"), "a"))}) == 4
    ones = torch.stack([(folded >> bit & 1).double().mean() for bit in range(31)])
    assert (ones - 0.5).abs().max() < 0.15  # 4 standard deviations of 200 fair coins
    assert fgpt.fold_in(key, 1).initial_seed() == 6429919509248852041  # recorded runs draw what they drew


def test_dropouts_that_differ():
    members = [fgpt.lora(GPT, fgpt.key(0), 2, target=Q, dropout=p) for p in (0.0, 0.5)]
    with pytest.raises(fgpt.InputError, match=r"at blocks.0.attn.q have dropouts of 0.0 and 0.5: .*one dropout"):
        fgpt.stack_adapters(members)
    prompts = [[1, 2], [3]]
    generated = fgpt.generate(GPT, prompts, eos_token_id=0, max_new_tokens=4, adapters=members)  # writing drops nothing
    assert generated == fgpt.generate(GPT, prompts, eos_token_id=0, max_new_tokens=4, adapters=[{}, {}])


def test_a_member_of_a_stack_is_saved_on_its_own(tmp_path: Path):
    members = [with_noise(x, 0.1) for x in different_members()]
    stacked = fgpt.stack_adapters(members)
    assert fgpt.num_trainable(stacked) == sum(x.a.numel() + x.b.numel() for x in stacked.values())  # pyright: ignore
    with pytest.raises(fgpt.InputError, match="is of a stack: save each adapter of unstack_adapters"):
        fgpt.save_peft(tree_map(lambda x: x[0], stacked), GPT, tmp_path / "no", "base")
    for i, member in enumerate(fgpt.unstack_adapters(stacked)):
        fgpt.save_peft(member, GPT, tmp_path / str(i), "base")
        read = fgpt.load_peft(tmp_path / str(i), GPT)
        want = fgpt.apply(fgpt.adapt(GPT, members[i]), ROWS.tokens)
        close(fgpt.apply(fgpt.adapt(GPT, read), ROWS.tokens), want, 1e-5)


def test_what_is_no_stack():
    with pytest.raises(fgpt.InputError, match="expected a stack, all leaves of one leading size"):
        fgpt.unstack_adapters(different_members()[1])


def test_a_gradient_through_a_stack_reaches_every_member():
    members = [with_noise(x, 0.1) for x in different_members()]

    def one(a: Any) -> Tensor:
        return fgpt.loss(fgpt.adapt(GPT, a), ROWS)

    got = grad(lambda trees: vmap(one)(fgpt.stack_adapters(trees)).sum())(members)
    for x, member in zip(got, members, strict=True):
        close(x, grad(one)(member), 1e-5)
