"""The example of MAML: its meta-gradient is that of finite differences and of `unroll`, and its tiny form prints."""

from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise
from builders.transforms import dot
from torch import Tensor
from torch.func import grad

import fgpt
from experiments.research import maml as M
from fgpt.transforms.unroll import metagradient, unroll
from fgpt.tree import astype, tree_map

BASE = astype(tiny(n_layer=1), torch.float64)
ADAPTERS: Any = with_noise(astype(fgpt.lora(BASE, fgpt.key(0), 1), torch.float64), 0.2)


def rows(seed: int) -> fgpt.Batch:
    """Of three tasks: [tasks rows seq]."""
    text = tokens(31, 3, 2, 7, seed=seed)
    return fgpt.Batch(text[..., :-1], text[..., 1:], torch.rand(3, 2, 6, generator=fgpt.key(seed)).double())


EPISODES = M.Episodes(rows(1), rows(2))


def loss(adapters: Any, rate: float = 0.3) -> Tensor:
    total, weight = M.maml_loss(adapters, BASE, EPISODES, rate=rate, num_steps=2)
    return total / weight


def test_the_meta_gradient_is_that_of_finite_differences():
    v, h = with_noise(tree_map(torch.zeros_like, ADAPTERS), 1.0, 3), 1e-5
    ends = [float(loss(tree_map(lambda x, d, s=s: x + s * h * d, ADAPTERS, v))) for s in (1, -1)]
    assert float(dot(grad(loss)(ADAPTERS), v)) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-7)


def test_it_is_the_metagradient_of_an_unrolled_training_of_each_task():
    """By the initial state, over steps of plain gradient descent; and not the first-order one."""
    sgd = fgpt.Optimizer(lambda params: (), lambda g, s, params: (tree_map(lambda x, y: x - 0.3 * y, params, g), s))
    step = fgpt.make_step(lambda a, base, batch, seed: fgpt.nll(fgpt.adapt(base, a), batch), sgd, max_norm=None)
    total, first_order = (tree_map(torch.zeros_like, ADAPTERS) for _ in range(2))
    for i in range(3):
        support, query = (tree_map(lambda x, i=i: x[i], batch) for batch in EPISODES)

        def advance(state: Any, t: int, meta: Any, support: Any = support) -> Any:
            return step(state, BASE, [support], None)[0]

        result = unroll(advance, fgpt.init_state(ADAPTERS, sgd), {"none": torch.zeros(())}, 2)
        slope = grad(lambda a, q=query: fgpt.nll(fgpt.adapt(BASE, a), q)[0])(result.final.trainable)
        by_initial = metagradient(advance, result, {"none": torch.zeros(())}, slope).initial.trainable
        total, first_order = tree_map(torch.add, total, by_initial), tree_map(torch.add, first_order, slope)
    weight = EPISODES.query.weights.sum()
    got = grad(loss)(ADAPTERS)
    close(got, tree_map(lambda x: x / weight, total), 1e-12)
    away = tree_map(lambda x, y: x / weight - y, first_order, got)
    assert float(dot(away, away).sqrt()) > 0.1 * float(dot(got, got).sqrt())


def test_a_step_takes_this_gradient():
    sgd = fgpt.Optimizer(lambda params: (), lambda g, s, params: (tree_map(torch.sub, params, g), s))
    step = fgpt.make_step(
        lambda a, base, episodes, seed: M.maml_loss(a, base, episodes, rate=0.3, num_steps=2), sgd, max_norm=None
    )
    state, metrics = step(fgpt.init_state(ADAPTERS, sgd), BASE, [EPISODES], None)
    close(tree_map(torch.sub, ADAPTERS, state.trainable), grad(loss)(ADAPTERS), 1e-12)
    assert float(metrics.loss) == pytest.approx(float(loss(ADAPTERS)), rel=1e-12)


def nine_rows(first: int) -> fgpt.Batch:
    numbers = torch.arange(first, first + 9)[:, None]
    return fgpt.Batch(numbers, numbers, torch.ones(9, 1))


def test_support_and_query_share_no_row():
    kinds = {"a": nine_rows(0), "b": nine_rows(10)}
    episodes = M.sample(kinds, fgpt.key(0), tasks=None, shots=4, queries=5)
    for i, first in enumerate((0, 10)):
        both = torch.cat([episodes.support.tokens[i], episodes.query.tokens[i]]).flatten()
        assert sorted(both.tolist()) == list(range(first, first + 9))
    assert M.sample(kinds, fgpt.key(0), tasks=1, shots=1, queries=1).query.tokens.shape == (1, 1, 1)


@pytest.mark.slow
def test_the_tiny_form_prints_both_sides(capsys: pytest.CaptureFixture[str]):
    results = M.main(["--tiny"])
    assert [len(side[0]) for side in results.values()] == [1 + len(M.RATES)] * 2
    assert all(side[0][-1] < side[0][0] for side in results.values())  # a step on the support set helps its queries
    _, joint, meta = capsys.readouterr().out.splitlines()
    assert joint.startswith("seed 0, joint: ")
    assert meta.startswith("seed 0, meta-learned: ")
