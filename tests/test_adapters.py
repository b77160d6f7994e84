"""Adapters as param transforms: the laws of the weight algebra, training, unions and selectors."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import close, gpt2_shape, same, shaken, tiny, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad

import fgpt
from fgpt.adapters import layers
from fgpt.tree import cast, count, leaves, update, walk

LINEARS = r"blocks\.\d+\.(attn|mlp)\.\w+"
X, Y = tokens(31, 2, 9), tokens(31, 2, 9, seed=1)
BATCH = fgpt.Batch(X, Y, torch.ones(2, 9))


def loss_of(params: fgpt.GPT) -> Callable[[fgpt.Adapters], Tensor]:
    return lambda adapters: fgpt.loss(fgpt.adapt(params, adapters), BATCH)


def step_loss(adapters: Any, params: Any, batch: fgpt.Batch, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters), batch)


# -------------------------------------------------------------------------------------------------------------- counts


def test_counts():
    small, medium = gpt2_shape(12, 12, 768), gpt2_shape(24, 16, 1024)
    assert fgpt.trainable(fgpt.lora(small, fgpt.key(0), 8, target=r"blocks\..*\.attn\.[qkvo]")) == 589_824
    assert fgpt.trainable(fgpt.lora(fgpt.fuse(small), fgpt.key(0), 8, target=r"blocks\..*\.(qkv|o)")) == 442_368
    assert fgpt.trainable(fgpt.lora(medium, fgpt.key(0), 4, target=r"blocks\..*\.attn\.(q|v)")) == 393_216
    fused = r"blocks\..*\.(attn\.qkv|attn\.o|mlp\.down)"
    assert fgpt.trainable(fgpt.lora(fgpt.fuse(small), fgpt.key(0), 8, target=fused)) == 811_008
    assert fgpt.trainable(fgpt.tune(small)) == 124_439_808


# ------------------------------------------------------------------------------------------------------------ training


def test_at_init_the_adapted_model_is_the_base_bitwise(gpt: fgpt.GPT):
    adapters = fgpt.lora(gpt, fgpt.key(0), 4, target=rf"wte|{LINEARS}")
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, adapters), X), fgpt.apply(gpt, X))
    assert same(fgpt.merge(fgpt.adapt(gpt, adapters)), gpt)


def test_a_step_moves_every_adapter_and_nothing_else(gpt: fgpt.GPT):
    """With B = 0 the gradient of A is zero, so the first step moves every B and no A; the second moves all."""
    adapters, optimizer = fgpt.lora(gpt, fgpt.key(0), 4, target=LINEARS), fgpt.adamw(1e-2)
    before = {path: x.clone() for path, x in leaves(gpt).items()}
    step = fgpt.make_step(step_loss, optimizer)
    zero = fgpt.start(adapters, optimizer)
    one, _ = step(zero, gpt, [BATCH], None)
    two, _ = step(one, gpt, [BATCH], None)
    assert same(before, leaves(gpt))
    old, new, newer = (leaves(state.trainable) for state in (zero, one, two))
    assert [len(x) for x in (old, new, newer)] == [24] * 3
    for path in old:
        assert torch.equal(old[path], new[path]) == path.endswith(".a")
        assert not torch.equal(new[path], newer[path])


# ------------------------------------------------------------------------------------------------------------ the laws


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([0.5, 8.0]), st.integers(0, 9))
def test_linear_is_dense(depth: int, rank: int, alpha: float, seed: int):
    w: Any = torch.randn(7, 5, generator=fgpt.key(seed))
    meaning = w.double()
    for i in range(depth):
        a, b = (torch.randn(*s, generator=fgpt.fold_in(fgpt.key(seed), i)) for s in ((rank, 5), (7, rank)))
        w, meaning = fgpt.Adapted(w, a, b, scale=alpha / rank), meaning + alpha / rank * b.double() @ a.double()
    x, bias = torch.randn(2, 3, 5, generator=fgpt.key(seed + 1)), torch.randn(7)
    close(fgpt.dense(w).double(), meaning, 1e-5, 1e-5)
    close(fgpt.linear(x, w, bias), x @ fgpt.dense(w).T + bias, 1e-4, 1e-5)
    close(fgpt.embed(tokens(7, 2, 3), w), fgpt.dense(w)[tokens(7, 2, 3)], 1e-4, 1e-5)


@given(st.integers(1, 3), st.booleans(), st.integers(0, 9))
def test_merged_is_factored(stacked: int, fused: bool, seed: int):
    """Stacked adapters too, and on a tied table, where one adapter moves embedding and head together."""
    params = fgpt.fuse(tiny()) if fused else tiny()
    trees = [
        shaken(fgpt.lora(params, fgpt.key(i), 1 + i, target=rf"wte|wpe|{LINEARS}"), seed=seed + i)
        for i in range(stacked)
    ]
    adapted = fgpt.adapt(params, *trees)
    merged = fgpt.merge(adapted)
    assert not any(isinstance(x, fgpt.Adapted) for _, x in walk(merged))
    assert leaves(merged).keys() == leaves(params).keys()
    close(fgpt.apply(merged, X), fgpt.apply(adapted, X), 1e-4, 1e-5)
    assert (fgpt.apply(adapted, X) - fgpt.apply(params, X)).abs().max() > 0.1


def test_an_adapter_on_a_tied_table_moves_embedding_and_head(gpt: fgpt.GPT):
    adapted = fgpt.adapt(gpt, shaken(fgpt.lora(gpt, fgpt.key(0), 2, target="wte")))
    table = fgpt.dense(adapted.wte.w)
    close(fgpt.apply(adapted, X), fgpt.apply(update(gpt, {"wte.w": table}), X), 1e-5)
    close(fgpt.embed(X, adapted.wte.w), table[X], 1e-6)
    close(fgpt.logits(adapted, torch.eye(16)), table.T, 1e-6)


def test_the_factored_path_never_merges(gpt: fgpt.GPT, factored: Callable[[], None]):
    adapters = shaken(fgpt.lora(gpt, fgpt.key(0), 2, target=rf"wte|{LINEARS}"))
    adapted = fgpt.adapt(gpt, adapters)
    fgpt.apply(adapted, X)
    grad(loss_of(gpt))(adapters)
    fgpt.generate(adapted, [[1], [2, 3]], end=0, most=3)
    with pytest.raises(AssertionError, match="dense was called"):
        fgpt.merge(adapted)
    factored()
    fgpt.merge(adapted)


def test_a_half_precision_base_keeps_its_dtype_and_the_adapters_theirs(gpt: fgpt.GPT):
    params, adapters = cast(gpt, torch.bfloat16), shaken(fgpt.lora(gpt, fgpt.key(0), 2, target=LINEARS))
    assert fgpt.apply(fgpt.adapt(params, adapters), X).dtype == torch.bfloat16
    assert {x.dtype for x in leaves(grad(loss_of(params))(adapters)).values()} == {torch.float32}
    assert same(leaves(fgpt.merge(fgpt.adapt(params, {}))), leaves(params))


# --------------------------------------------------------------------------------------------- unions and selectors


def test_lora_and_tuned_leaves_are_one_tree(gpt: fgpt.GPT):
    lora, norms = fgpt.lora(gpt, fgpt.key(0), 2), fgpt.tune(gpt, r".*ln_.*")
    both = shaken(lora | norms, seed=3)
    assert fgpt.trainable(both) == fgpt.trainable(lora) + 2 * 16 * (2 * 2 + 1)
    expected = fgpt.adapt(update(gpt, {p: both[p] for p in norms}), {p: both[p] for p in lora})
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, both), X), fgpt.apply(expected, X))
    assert {p for p, g in leaves(grad(loss_of(gpt))(both)).items() if g.abs().max() == 0} == set()


def test_a_lora_lies_on_a_weight_tuned_in_the_same_tree(gpt: fgpt.GPT):
    """Whichever side of the union comes first, neither is silently dropped."""
    lora, full = shaken(fgpt.lora(gpt, fgpt.key(0), 2)), shaken(fgpt.tune(gpt), seed=5)
    expected = fgpt.apply(fgpt.adapt(gpt, full, lora), X)
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, lora | full), X), expected)
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, full | lora), X), expected)


def test_tuning_everything_is_the_model(gpt: fgpt.GPT):
    full = fgpt.tune(gpt, ".*")
    assert fgpt.trainable(full) == count(gpt)
    assert same(fgpt.adapt(gpt, full), gpt)
    moved = shaken(full, seed=7)
    assert same(leaves(fgpt.adapt(gpt, moved)), moved)
    assert {x.dtype for x in leaves(fgpt.tune(cast(gpt, torch.bfloat16))).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: fgpt.lora(p, fgpt.key(0), target=r"blocks\.\d+\.attn\.c_attn"),
            r"no path; nearest are blocks\.0\.a",
        ),
        (lambda p: fgpt.lora(p, fgpt.key(0), target="(q"), "not a regular expression"),
        (lambda p: fgpt.tune(p, r"ln_f\.weight"), r"no path; nearest are .*ln_f\.w"),
        (lambda p: fgpt.lora(p, fgpt.key(0), rank=17), r"rank 17 on blocks\.0\.attn\.q: expected 1 to 16"),
        (lambda p: fgpt.lora(p, fgpt.key(0), rank=0), "rank 0"),
        (
            lambda p: fgpt.adapt(p, fgpt.lora(tiny(d_model=8), fgpt.key(0), 2)),
            r"adapter at blocks\.0\.attn\.q fits a weight of \[8, 8\], but the base has \[16, 16\]",
        ),
        (lambda p: fgpt.adapt(p, {"ln_f.w": torch.ones(8)}), r"ln_f\.w has shape \[8\], but the base has \[16\]"),
        (lambda p: fgpt.adapt(p, {"ln_g.w": torch.ones(16)}), r"no leaf 'ln_g\.w' to replace"),
        (lambda p: fgpt.adapt(p, fgpt.lora(tiny(n_layer=3), fgpt.key(0), 2)), r"no layer 'blocks\.2\.attn\.q'"),
        (lambda p: fgpt.adapt(p, fgpt.lora(fgpt.fuse(p), fgpt.key(0), 2)), r"for a fused base: fuse\(params\) first"),
        (lambda p: fgpt.adapt(fgpt.fuse(p), fgpt.lora(p, fgpt.key(0), 2)), r"not fused: do not fuse\(params\)"),
        (lambda p: fgpt.fuse(fgpt.adapt(p, fgpt.lora(p, fgpt.key(0), 2))), "fuse the base first"),
        (lambda p: fgpt.save(fgpt.adapt(p, fgpt.lora(p, fgpt.key(0), 2)), Path("x")), r"merge\(params\) first"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[fgpt.GPT], Any], message: str, gpt: fgpt.GPT):
    with pytest.raises(fgpt.InputError, match=message):
        make(gpt)


# ---------------------------------------------------------------------------------------------------------- randomness


def test_keys_are_read_and_never_advanced(gpt: fgpt.GPT):
    rng, world = fgpt.key(3), torch.get_rng_state()
    before = rng.get_state()
    fgpt.init(gpt.cfg, rng)
    fgpt.lora(gpt, rng, 2)
    first = fgpt.generate(gpt, [[1], [2, 3]], end=0, most=8, temperature=1.0, rng=rng)
    assert fgpt.generate(gpt, [[1], [2, 3]], end=0, most=8, temperature=1.0, rng=rng) == first
    assert fgpt.generate(gpt, [[1], [2, 3]], end=0, most=8, temperature=1.0, rng=fgpt.key(4)) != first
    assert torch.equal(rng.get_state(), before)
    assert torch.equal(torch.get_rng_state(), world)


def test_draws_belong_to_the_key_and_the_path(gpt: fgpt.GPT):
    some = fgpt.lora(gpt, fgpt.key(0), 2)
    more = fgpt.lora(gpt, fgpt.key(0), 2, target=LINEARS)
    assert same(some, {path: more[path] for path in some})  # what else is adapted changes nothing
    drawn = [x.a for x in more.values() if x.a.shape[1] == 16] + [x.a for x in fgpt.lora(gpt, fgpt.key(1), 2).values()]
    assert len({tuple(a.flatten().tolist()) for a in drawn}) == len(drawn)
    assert all(x.a.abs().max() <= 16**-0.5 and x.a.std() > 0.1 for x in some.values())
    assert set(some) == {p for p in layers(gpt) if re.fullmatch(r"blocks\.\d\.attn\.[qkv]", p)}


def test_adapters_and_params_are_fp32_whatever_the_default_is(gpt: fgpt.GPT):
    torch.set_default_dtype(torch.float64)
    try:
        adapters, params = fgpt.lora(gpt, fgpt.key(0), 2), fgpt.init(gpt.cfg, fgpt.key(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(adapters, fgpt.lora(gpt, fgpt.key(0), 2))
    assert same(params, fgpt.init(gpt.cfg, fgpt.key(0)))
