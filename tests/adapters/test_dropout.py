"""Dropout of adapters: masks by key and path, their mean, and micro-batches."""

from typing import Any

import pytest
import torch
from builders import close, same, stack_trees, tokens, with_noise
from builders.adapters import BATCH, LINEARS, PLAIN, assert_near, step_loss
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

import fgpt
from fgpt.model import Linear
from fgpt.train_step import make_step
from fgpt.tree import replace_at, tree_map

X, Y = tokens(31, 2, 9), tokens(31, 2, 9, seed=1)


def fresh_with_dropout(p: float = 0.5, params: fgpt.GPT = PLAIN) -> Any:
    return with_noise(fgpt.lora(params, fgpt.key(0), 4, target=LINEARS, dropout=p))


def test_dropout_needs_a_key():
    """Without one it is off, and so it is in the merged reading."""
    adapters = fresh_with_dropout()
    plain = tree_map(lambda x: x, {p: fgpt.LoRA(x.a, x.b, x.alpha) for p, x in adapters.items()})
    expected = fgpt.apply(fgpt.adapt(PLAIN, plain), X)
    assert torch.equal(fgpt.apply(fgpt.adapt(PLAIN, adapters), X), expected)
    assert torch.equal(fgpt.apply(fgpt.adapt(PLAIN, plain, rng=fgpt.key(0)), X), expected)  # probability 0
    with_key = fgpt.adapt(PLAIN, adapters, rng=fgpt.key(0))
    assert not torch.allclose(fgpt.apply(with_key, X), expected, atol=0.1)
    assert same(fgpt.merge(with_key), fgpt.merge(fgpt.adapt(PLAIN, plain)))


def test_one_key_is_one_mask_and_two_are_two():
    adapters, world = fresh_with_dropout(), torch.get_rng_state()

    def logits(rng: Any) -> Tensor:
        return fgpt.apply(fgpt.adapt(PLAIN, adapters, rng=rng), X)

    rng = fgpt.key(0)
    before = rng.get_state()
    first = logits(rng)
    assert torch.equal(logits(rng), first)
    assert torch.equal(logits(fgpt.seed_tensor(fgpt.key(0))), first)  # a key, or its seed
    assert not torch.allclose(logits(fgpt.key(1)), first, atol=0.1)
    assert torch.equal(rng.get_state(), before)
    assert torch.equal(torch.get_rng_state(), world)


def test_every_path_and_every_tree_has_its_own_mask():
    """Seen through an identity: a layer whose A and B pass its input on."""
    eye = fgpt.LoRA(torch.eye(8), torch.eye(8), 8.0, dropout=0.5)
    params = {name: Linear(torch.zeros(8, 8)) for name in ("q", "k")}
    trees = [{"q": eye, "k": eye}, {"q": eye}]
    adapted = fgpt.adapt(params, *trees, rng=fgpt.key(0))
    outer, inner, other = adapted["q"].w, adapted["q"].w.base, adapted["k"].w  # pyright: ignore
    x = torch.ones(16, 8)
    masks = [fgpt.linear(x, w) for w in (inner, other, replace_at(outer, {"base": torch.zeros(8, 8)}))]
    for i, mask in enumerate(masks):
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert not any(torch.equal(mask, masks[j]) for j in range(i))


def test_dropouts_mean_is_no_dropout():
    """And its spread is that of x_i keep_i / (1 - p), summed through B·A."""
    w, a, b = (torch.randn(*s, generator=fgpt.key(i)) for i, s in enumerate([(5, 6), (2, 6), (5, 2)]))
    x, n, p = torch.randn(3, 6, generator=fgpt.key(9)), 4096, 0.3

    def once(seed: Tensor) -> Tensor:
        return fgpt.linear(x, fgpt.Adapted(w, a, b, seed=seed, dropout=p))

    seeds = torch.arange(n)
    out = vmap(once)(seeds)
    close(out[7], once(seeds[7]), 1e-5)
    assert ((out.mean(0) - fgpt.linear(x, fgpt.Adapted(w, a, b))).abs() <= 5 * out.std(0) / n**0.5).all()
    spread = (p / (1 - p) * x.square() @ (b @ a).square().T).sqrt()
    torch.testing.assert_close(out.std(0), spread, atol=0, rtol=0.1)


def test_seeds_are_mapped_over():
    """An ensemble of masks in one pass, and their gradients."""
    adapters, seeds = fresh_with_dropout(), torch.tensor([3, 4, 5])

    def loss(adapters: Any, seed: Tensor) -> Tensor:
        return fgpt.loss(fgpt.adapt(PLAIN, adapters, rng=seed), BATCH)

    got = vmap(loss, in_dims=(None, 0))(adapters, seeds)
    close(got, torch.stack([loss(adapters, s) for s in seeds]), 1e-5)
    assert got.unique().numel() == 3
    grads = vmap(grad(loss), in_dims=(None, 0))(adapters, seeds)
    close(grads, stack_trees([grad(loss)(adapters, s) for s in seeds]), 1e-5)


@pytest.mark.parametrize("make", [fgpt.lora, fgpt.dora])
def test_an_adapted_head_drops_what_its_loss_drops(make: Any):
    """`linear` for logits and `linear_terms` for the loss: one mask, also where rows are scaled."""
    adapted = fgpt.adapt(PLAIN, with_noise(make(PLAIN, fgpt.key(0), 4, target="wte", dropout=0.5)), rng=fgpt.key(0))
    logits = fgpt.apply(adapted, X).flatten(0, 1)
    assert_near(fgpt.loss(adapted, BATCH), F.cross_entropy(logits, Y.flatten()))


def test_each_micro_batch_draws_its_own_mask():
    seeds: list[Tensor | None] = []

    def loss(adapters: Any, params: Any, batch: fgpt.Batch, rng: Tensor | None) -> tuple[Tensor, Tensor]:
        seeds.append(rng)
        return step_loss(adapters, params, batch, rng)

    optimizer = fgpt.adamw(1e-2)
    state, step = fgpt.init_state(fresh_with_dropout(), optimizer), make_step(loss, optimizer)
    first, repeated, other, none = (
        step(state, PLAIN, [BATCH] * 3, rng)[0] for rng in (*map(fgpt.key, (0, 0, 1)), None)
    )
    assert same(first, repeated)
    assert not same(first, other)
    assert not same(first, none)
    drawn = [None if s is None else int(s) for s in seeds]
    assert drawn[:3] == drawn[3:6]
    assert len(set(drawn[:3] + drawn[6:9])) == 6
    assert drawn[9:] == [None] * 3
