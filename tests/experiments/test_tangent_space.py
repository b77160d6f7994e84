"""The example of task arithmetic in the tangent space: sums are what they are said to be, and its tiny form prints."""

from typing import Any

import pytest
import torch
from builders import close, with_noise

import fgpt
from experiments.research import tangent_space as T
from fgpt.tree import tree_map

PROBLEM = T.build(T.TINY, seed=0)
BATCH = T.take(PROBLEM.test["who"], [0, 1])


def as_lora(bs: Any) -> Any:
    return {path: fgpt.LoRA(x.a, bs[path], x.alpha) for path, x in PROBLEM.fresh.items()}


def test_in_the_tangent_space_a_sum_is_the_sum_of_its_effects():
    first, second = (with_noise(PROBLEM.origin(), 0.05, seed) for seed in (1, 2))
    models, origin = PROBLEM.models(), PROBLEM.origin()
    changes = {
        name: [model(bs, BATCH) - model(origin, BATCH) for bs in (first, second, T.add([first, second], 0.5))]
        for name, model in models.items()
    }
    close(changes["tangent"][2], (changes["tangent"][0] + changes["tangent"][1]) / 2, 1e-3)
    usual = changes["as usual"]
    assert float((usual[2] - (usual[0] + usual[1]) / 2).norm() / usual[2].norm()) > 0.05


def test_a_sum_of_bs_is_the_linear_combination_of_the_adapters():
    bs = [with_noise(PROBLEM.origin(), 0.05, seed) for seed in (1, 2)]
    combined = fgpt.combine(PROBLEM.base, [as_lora(x) for x in bs], [0.25, 0.25])
    value, expected = (
        T.nll(PROBLEM.logits(T.add(bs, 0.25), BATCH), BATCH)[0],
        fgpt.nll(fgpt.adapt(PROBLEM.base, combined), BATCH)[0],
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_training_reads_no_row_that_is_held_out():
    for kind in T.KINDS:
        train, test = ({tuple(row) for row in rows[kind].tokens.tolist()} for rows in (PROBLEM.train, PROBLEM.test))
        assert len(test) == T.TINY.held_out
        assert not train & test
        assert len(train) > 30


def test_the_kernel_is_that_of_gradients_one_by_one():
    got = T.kernel(PROBLEM, T.TINY)
    vectors = []
    for kind in T.KINDS:
        for i in range(T.TINY.ntk_rows):
            row = T.take(PROBLEM.train[kind], [i])
            bs = tree_map(lambda x: x.clone().requires_grad_(), PROBLEM.origin())
            grads = torch.autograd.grad(fgpt.nll(PROBLEM.adapt(bs), row)[0], list(bs.values()))
            vector = torch.cat([g.flatten() for g in grads])
            vectors.append(vector / vector.norm())
    n = T.TINY.ntk_rows
    assert n == 2
    for i in range(4):
        for j in range(4):
            pairs = [(a, b) for a in range(n) for b in range(n) if (i, a) != (j, b)]
            mean = sum(float(vectors[n * i + a] @ vectors[n * j + b]) for a, b in pairs) / len(pairs)
            assert float(got[i, j]) == pytest.approx(mean, abs=1e-4)


@pytest.mark.slow
def test_the_tiny_form_prints_its_losses_and_the_table(capsys: pytest.CaptureFixture[str]):
    results = T.main(["--tiny"])
    assert all(x.alone < x.before for each in results.values() for x in each)
    usual, tangent, _, *rows = capsys.readouterr().out.splitlines()
    assert usual.startswith("seed 0, as usual: ")
    assert tangent.startswith("seed 0, tangent: ")
    assert [row.split()[0] for row in rows] == list(T.KINDS)
