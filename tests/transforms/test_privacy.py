"""Private steps: what a row can change, the noise, the divisor, lots, and that adapters really learn."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

import fgpt
from fgpt.kernels.dropout import normal_noise
from fgpt.losses import Batch
from fgpt.optim import Optimizer, global_norm
from fgpt.transforms.privacy import (
    GaussianMechanism,
    leaves_without_gradient,
    private_step,
    sample_lot,
    with_normal_noise,
)
from fgpt.tree import leaves, tree_leaves, tree_map

BASE = tiny()
KINDS = {
    "lora": with_noise(fgpt.lora(BASE, fgpt.key(0), 2), 0.1),
    "dora": with_noise(fgpt.dora(BASE, fgpt.key(0), 2), 0.05),
    "ia3": with_noise(fgpt.ia3(BASE), 0.1),
    "leaves": fgpt.trainable_leaves(BASE, r".*ln_.*|wte\.w"),
}
LENGTHS = st.lists(st.integers(2, 20), min_size=2, max_size=9)


def rows_of(lengths: Sequence[int], seed: int = 0) -> list[Batch]:
    """Rows of these lengths, each a batch; the weights of some of their positions are 0."""
    rows: list[Batch] = []
    for i, length in enumerate(lengths):
        text = tokens(31, 1, length + 1, seed=100 * seed + i)
        weights = torch.rand(1, length, generator=fgpt.key(i)) * (torch.arange(length) >= length // 3)
        rows.append(Batch(text[:, :-1], text[:, 1:], weights))
    return rows


def joined(rows: Sequence[Batch]) -> Batch:
    """The rows as one batch, filled up on the right."""
    width = max(row.tokens.shape[1] for row in rows)

    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]))

    return tree_map(lambda *xs: torch.cat([pad(x) for x in xs]), *rows)


def loss(adapters: Any, base: Any, batch: Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(base, adapters, rng=seed), batch)


def sgd() -> Optimizer:
    """The gradient itself, as the change of the params."""
    return Optimizer(lambda params: (), lambda g, state, params: (tree_map(torch.sub, params, g), state))


def released(batches: Sequence[Batch], mechanism: GaussianMechanism, rng: Any, adapters: Any, base: Any = BASE) -> Any:
    """What a step hands to its optimizer, times the divisor: the sum with its noise."""
    captured: list[Any] = []

    def update(grads: Any, state: Any, params: Any) -> Any:
        captured.append(grads)
        return params, state

    step = private_step(loss, Optimizer(lambda params: (), update), mechanism)
    step(fgpt.init_state(adapters, sgd()), base, batches, rng)
    return tree_map(lambda g: g * mechanism.lot_size, captured[0])


def silent(max_norm: float, lot_size: float = 1.0) -> GaussianMechanism:
    return GaussianMechanism(max_norm, 0.0, lot_size)


@settings(max_examples=12)
@given(LENGTHS, st.data(), st.sampled_from([*KINDS]), st.sampled_from([1e-2, 1.0, 100.0]))
def test_a_row_changes_the_sum_by_the_bound_at_most(lengths: list[int], data: Any, kind: str, bound: float):
    """Whatever the other rows are, and in which micro-batches they come: the sensitivity that the noise hides."""
    removed, split = data.draw(st.integers(0, len(lengths) - 1)), data.draw(st.integers(1, len(lengths)))
    rows, adapters = rows_of(lengths, seed=len(lengths)), KINDS[kind]
    parts = [joined(part) for part in (rows[:split], rows[split:]) if part]
    whole = released(parts, silent(bound), fgpt.key(0), adapters)
    others = [row for i, row in enumerate(rows) if i != removed]
    rest = released([joined(others)], silent(bound), fgpt.key(0), adapters)
    change = tree_map(torch.sub, whole, rest)
    alone = grad(lambda a: loss(a, BASE, rows[removed], None)[0])(adapters)
    norm = float(global_norm(alone))
    assert float(global_norm(change)) <= bound * (1 + 1e-4) + 1e-5 * len(lengths)
    assert float(global_norm(change)) == pytest.approx(min(bound, norm), rel=1e-2, abs=1e-4)
    close(change, tree_map(lambda g: g * min(1.0, bound / max(norm, 1e-30)), alone), 1e-2, 1e-3 * bound)


@pytest.mark.parametrize("quantized", ["int8", "nf4"])
def test_the_bound_holds_over_a_quantized_base(quantized: Any):
    base = fgpt.quantize(fgpt.init(fgpt.Config(2, 2, 64, 24, 31, 64), fgpt.key(0)), quantized)
    adapters = with_noise(fgpt.lora(base, fgpt.key(0), 2), 0.1)
    rows = rows_of([5, 20, 9, 12])
    whole = released([joined(rows)], silent(0.5), fgpt.key(0), adapters, base)
    rest = released([joined(rows[1:])], silent(0.5), fgpt.key(0), adapters, base)
    change = float(global_norm(tree_map(torch.sub, whole, rest)))
    assert change == pytest.approx(0.5, rel=1e-2)  # these rows are clipped


@pytest.mark.slow
def test_the_noise_has_the_variance_of_the_mechanism():
    """Over 400 keys, in each leaf: σC, mean zero, and none of it shared by leaves."""
    tree, batch = {"a": torch.zeros(3, 40), "b": torch.zeros(70)}, joined(rows_of([6, 9]))
    clean = step_of_sums(silent(0.3, 5.0))(fgpt.init_state(tree, sgd()), None, [batch], fgpt.key(0))[0].trainable
    step = step_of_sums(GaussianMechanism(max_norm=0.3, noise_multiplier=1.7, lot_size=5.0))
    draws: dict[str, list[Tensor]] = {"a": [], "b": []}
    for seed in range(400):
        state, _ = step(fgpt.init_state(tree, sgd()), None, [batch], fgpt.key(seed))
        for path, x in state.trainable.items():
            draws[path].append(5.0 * (x - clean[path]).flatten())
    unit = {path: torch.stack(xs) / (1.7 * 0.3) for path, xs in draws.items()}
    for path, noise in unit.items():
        assert float(noise.std()) == pytest.approx(1.0, abs=5 / math.sqrt(2 * noise.numel())), path
        assert abs(float(noise.mean())) < 5 / math.sqrt(noise.numel()), path
    for first, second in ((unit["a"][:, :70], unit["b"]), (unit["a"][1:], unit["a"][:-1])):
        assert abs(float((first * second).mean())) < 5 / math.sqrt(first.numel())


def step_of_sums(mechanism: GaussianMechanism) -> Any:
    """A step by a loss that is linear in its two leaves."""

    def linear(tree: Any, frozen: Any, batch: Batch, seed: Any) -> tuple[Tensor, Tensor]:
        return batch.weights.sum() * (tree["a"].sum() + 2 * tree["b"].sum()), batch.weights.sum()

    return private_step(linear, sgd(), mechanism)


def test_noise_is_added_once_and_knows_no_rows():
    """The same for one micro-batch and for three, and for other rows; another for another key."""
    adapters, rows = KINDS["lora"], rows_of([6, 9, 12])
    mechanism = GaussianMechanism(0.3, 1.0, 5.0)

    def noise(batches: Sequence[Batch], seed: int) -> Any:
        noisy = released(batches, mechanism, fgpt.key(seed), adapters)
        return tree_map(torch.sub, noisy, released(batches, silent(0.3, 5.0), fgpt.key(seed), adapters))

    once = noise([joined(rows)], 1)
    close(noise(rows, 1), once, 1e-4, 1e-5)
    close(noise([joined(rows_of([4, 4], seed=7))], 1), once, 1e-4, 1e-5)
    other = noise([joined(rows)], 2)
    assert all((x - y).abs().max() > 0.01 for x, y in zip(tree_leaves(once), tree_leaves(other), strict=True))


def test_the_noise_of_a_large_tree_is_one_sequence(monkeypatch: pytest.MonkeyPatch):
    """Whatever leaves are drawn for at once, and in any dtype: all leaves in order have the numbers of the seed."""
    tree = {"a": torch.zeros(3, 7), "b": torch.zeros(5, dtype=torch.float64), "c": torch.zeros(8)}
    expected = 2 * normal_noise(torch.tensor(9), 34)
    for size in (1 << 24, 1, 100):
        monkeypatch.setattr("fgpt.kernels.leaf_lists.GROUP_BYTES", size)
        noisy = with_normal_noise(tree, 2.0, torch.tensor(9))
        assert [x.dtype for x in tree_leaves(noisy)] == [x.dtype for x in tree_leaves(tree)]
        assert torch.equal(torch.cat([x.float().flatten() for x in tree_leaves(noisy)]), expected)


def test_the_divisor_is_the_expected_lot_and_no_count():
    """Twice the rows move the params twice as far, and heavier rows no further once they are clipped."""
    adapters, rows = KINDS["lora"], rows_of([6, 9])

    def change(batch: Batch, lot_size: float) -> Any:
        step = private_step(loss, sgd(), silent(1e-3, lot_size))
        state, _ = step(fgpt.init_state(adapters, sgd()), BASE, [batch], fgpt.key(0))
        return tree_map(torch.sub, adapters, state.trainable)

    once, twice = change(joined(rows), 4.0), change(joined(rows + rows), 4.0)
    close(twice, tree_map(lambda x: 2 * x, once), 1e-2, 1e-6)
    close(change(joined(rows), 8.0), tree_map(lambda x: x / 2, once), 1e-2, 1e-6)
    heavy = joined([replace(row, weights=10 * row.weights) for row in rows])
    close(change(heavy, 4.0), once, 1e-2, 1e-6)


def test_an_empty_lot_is_a_step_of_noise_alone():
    adapters, mechanism = KINDS["lora"], GaussianMechanism(0.3, 1.0, 5.0)
    nothing = joined([replace(row, weights=torch.zeros_like(row.weights)) for row in rows_of([6, 9])])
    expected = with_normal_noise(
        tree_map(torch.zeros_like, adapters),
        0.3,
        fgpt.fold_in(fgpt.seed_tensor(fgpt.fold_in(fgpt.key(3), 0)), "finish"),
    )
    for batches in ([], [nothing]):
        close(released(batches, mechanism, fgpt.key(3), adapters), expected, 1e-5, 1e-6)
        step = private_step(loss, fgpt.adamw(0.1), mechanism)
        state, metrics = step(fgpt.init_state(adapters, fgpt.adamw(0.1)), BASE, batches, fgpt.key(3))
        assert (int(state.step), float(metrics.loss), float(metrics.weight)) == (1, 0.0, 0.0)
        assert math.isfinite(float(metrics.grad_norm))


def test_a_step_is_a_function_of_its_key_and_can_be_mapped_over():
    optimizer, batch = fgpt.adamw(1e-2), joined(rows_of([6, 9, 5]))
    step = private_step(loss, optimizer, GaussianMechanism(0.3, 0.5, 3.0))
    states = [fgpt.init_state(with_noise(KINDS["lora"], 0.01, seed), optimizer) for seed in range(2)]
    alone = [step(state, BASE, [batch], torch.tensor(i)) for i, state in enumerate(states)]
    again = [step(state, BASE, [batch], torch.tensor(i)) for i, state in enumerate(states)]
    for (first, _), (second, _) in zip(alone, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tree_leaves(first), tree_leaves(second), strict=True))
    stacked = tree_map(lambda *xs: torch.stack(xs), *states)
    mapped, metrics = vmap(lambda s, k: step(s, BASE, [batch], k))(stacked, torch.arange(2))
    for i, (state, figures) in enumerate(alone):
        close(tree_map(lambda x, i=i: x[i], mapped.opt_state.mu), state.opt_state.mu, 1e-3, 1e-6)
        assert float(metrics.loss[i]) == pytest.approx(float(figures.loss), rel=1e-5)


@pytest.mark.parametrize("kind", [*KINDS])
def test_adapters_learn_under_noise(kind: str):
    """Every leaf of a fresh one moves further along its gradient than noise takes it, and the loss falls."""
    fresh = {
        "lora": fgpt.lora(BASE, fgpt.key(0), 2),
        "dora": fgpt.dora(BASE, fgpt.key(0), 2),
        "ia3": fgpt.ia3(BASE),
        "leaves": KINDS["leaves"],
    }[kind]
    batch, optimizer = joined(rows_of([12, 9, 15, 20] * 2)), fgpt.adamw(2e-2)
    step = private_step(loss, optimizer, GaussianMechanism(1.0, 0.05, 8.0))
    state, losses = fgpt.init_state(fresh, optimizer), []
    for i in range(25):
        state, metrics = step(state, BASE, [batch], fgpt.fold_in(fgpt.key(0), i))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.1
    for path, x in leaves(state.trainable).items():
        assert (x - leaves(fresh)[path]).abs().max() > 1e-2, path


def test_a_leaf_that_only_noise_would_move_is_named():
    """Not the A of a fresh LoRA, whose gradient is 0 because its B is; but an adapter that the loss does not read, and
    one that it reads without a gradient.
    """
    adapters, batches = fgpt.lora(BASE, fgpt.key(0), 2), rows_of([6, 9])
    assert leaves_without_gradient(loss, adapters, BASE, batches) == []

    def detached(adapters: Any, base: Any, batch: Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        path = "blocks.1.mlp.up"
        return loss({**adapters, path: tree_map(torch.detach, adapters[path])}, base, batch, seed)

    assert leaves_without_gradient(detached, adapters, BASE, batches) == ["blocks.1.mlp.up/a", "blocks.1.mlp.up/b"]
    unread = {**adapters, "elsewhere": torch.zeros(3)}

    def without(adapters: Any, base: Any, batch: Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        return loss({path: x for path, x in adapters.items() if path != "elsewhere"}, base, batch, seed)

    assert leaves_without_gradient(without, unread, BASE, batches) == ["elsewhere"]


@given(st.integers(1, 400), st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_a_lot_is_decided_by_its_key(n: int, rate: float, seed: int):
    key = fgpt.key(seed)
    lot = sample_lot(n, rate, key)
    assert lot == sorted(set(lot))
    assert all(0 <= i < n for i in lot)
    assert sample_lot(n, rate, key) == lot  # the key is not advanced
    assume(n > 50 and 0.2 < rate < 0.8)
    assert sample_lot(n, rate, fgpt.fold_in(key, 1)) != lot


def test_lots_are_drawn_by_poisson_sampling():
    """Each example in a share of lots, and any two together in its square: no lot of fixed size has that."""
    n, rate, count = 40, 0.2, 4000
    is_in = torch.zeros(count, n, dtype=torch.float64)
    for i in range(count):
        is_in[i, sample_lot(n, rate, fgpt.fold_in(fgpt.key(0), i))] = 1.0
    assert float((is_in.mean(0) - rate).abs().max()) < 5 * math.sqrt(rate * (1 - rate) / count)
    together = is_in.T @ is_in / count
    apart = together[~torch.eye(n, dtype=torch.bool)]
    assert float((apart - rate**2).abs().max()) < 6 * math.sqrt(rate**2 / count)
    sizes = is_in.sum(1)
    assert float(sizes.var()) == pytest.approx(n * rate * (1 - rate), rel=0.15)
    assert float(sizes.min()) <= 2
    assert sample_lot(5, 1.0, fgpt.key(0)) == [0, 1, 2, 3, 4]


def test_what_is_refused():
    adapters, batch = KINDS["lora"], joined(rows_of([6, 9]))
    step = private_step(loss, sgd(), GaussianMechanism(0.3, 1.0, 5.0))
    state = fgpt.init_state(adapters, sgd())
    with pytest.raises(fgpt.InputError, match="a private step draws noise: give it a key"):
        step(state, BASE, [batch])
    packed = replace(batch, segments=torch.ones_like(batch.tokens))
    with pytest.raises(fgpt.InputError, match="a packed row holds several examples"):
        step(state, BASE, [packed], fgpt.key(0))
    for numbers, named in (
        ((0.0, 1.0, 1.0), "max_norm is 0.0"),
        ((1.0, -1.0, 1.0), "noise_multiplier is -1.0"),
        ((1.0, math.nan, 1.0), "noise_multiplier is nan"),
        ((1.0, 1.0, math.inf), "lot_size is inf"),
    ):
        with pytest.raises(fgpt.InputError, match=named):
            private_step(loss, sgd(), GaussianMechanism(*numbers))
    for rate in (0.0, 1.1, math.nan):
        with pytest.raises(fgpt.InputError, match="expected a probability above 0"):
            sample_lot(3, rate, fgpt.key(0))
