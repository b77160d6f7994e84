"""Draws have the filtered distribution; rows and steps are independent."""

import math
from itertools import pairwise

import pytest
import torch
from builders.sampling import SamplingCase, keys_of_rows, padded_texts, sampling_cases
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fgpt
from fgpt.generation import sampling as S
from fgpt.rng import fold_in

LOGITS = torch.tensor([2.0, -1.0, 0.3, 0.3, -math.inf, 1.1, -3.0, 0.9, 0.0, -0.4])


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Of Pearson's chi-square test: how likely counts at least so far from n·probs are, were probs the truth.

    x = Σ (counts - n·probs)² / (n·probs) has k - 1 degrees of freedom over k possible outcomes, and the tail of that
    distribution is the incomplete gamma function Q((k - 1) / 2, x / 2). An outcome that cannot be, and is, gives 0.
    """
    if counts[probs == 0].any():
        return 0.0
    expected, observed = counts.sum() * probs[probs > 0].double(), counts[probs > 0].double()
    assert expected.min() >= 5  # the rule of thumb for the approximation
    x = ((observed - expected).square() / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, x / 2))


SAMPLINGS = [
    S.SamplingParams(1.0),
    S.SamplingParams(0.7, top_k=5),
    S.SamplingParams(1.5, top_p=0.8),
    S.SamplingParams(1.0, min_p=0.2),
    S.SamplingParams(1.3, top_k=8, top_p=0.95, min_p=0.05, repetition_penalty=1.5, no_repeat_ngram=2),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_have_the_filtered_distribution(sampling: S.SamplingParams):
    """At a threshold of 1e-4; counts of the plain softmax's draws, of a slightly warmer one's, are far below it."""
    n, observed = 20_000, padded_texts([[5, 7, 2, 5]])
    one = sampling.logits_processor(LOGITS[None], observed)
    exact = one[0].double().softmax(-1)
    counts = S.sample(one.expand(n, -1), keys_of_rows(n)).bincount(minlength=len(LOGITS))
    assert p_value(counts, exact) > 1e-4
    assert p_value(counts, (one[0].double() / 1.1).softmax(-1)) < 1e-4
    if sampling != S.SamplingParams(1.0):
        assert p_value(counts, LOGITS.double().softmax(-1)) < 1e-4


def test_steps_and_neighboring_rows_are_independent():
    """Pairs of draws, of one key's steps and of two rows' keys, have the product of the two distributions."""
    n, p = 20_000, LOGITS[[0, 2, 5, 7]].double().softmax(-1)
    logits, base = LOGITS[[0, 2, 5, 7]].expand(n, -1), fgpt.key(3)
    steps = S.sample(logits, [fold_in(base, step) for step in range(n)]).tolist()
    rows = S.sample(logits, [fold_in(fold_in(base, row), 1) for row in range(n)]).tolist()
    for drawn in (list(pairwise(steps))[::2], list(pairwise(rows))[::2], list(zip(steps, rows))):
        counts = torch.tensor([a * 4 + b for a, b in drawn]).bincount(minlength=16)
        assert p_value(counts, torch.outer(p, p).flatten()) > 1e-4
    twins = torch.tensor([a * 4 + a for a in steps]).bincount(minlength=16)
    assert p_value(twins, torch.outer(p, p).flatten()) == 0.0


def test_a_large_vocabulary_is_drawn_evenly():
    vocab, n, bins = 50_257, 4_000, 20
    logits = torch.zeros(1, vocab).expand(50, -1)
    drawn = torch.cat([S.sample(logits, keys_of_rows(50, seed)) for seed in range(n // 50)])
    edges = [vocab * i // bins for i in range(bins + 1)]
    probs = torch.tensor([(b - a) / vocab for a, b in pairwise(edges)])
    counts = torch.histc(drawn.double(), bins=bins, min=0, max=vocab).long()
    assert p_value(counts, probs) > 1e-4
    assert len(drawn.unique()) > 0.9 * n  # collisions are few: about n² / 2 vocab, which is 160


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_no_number_draws_a_forbidden_token(u: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(S, "uniform", lambda rng: u)
    logits = torch.full((2, 1000), -math.inf)
    logits[0, [3, 500, 996]], logits[1, 7] = torch.tensor([0.1, 2.0, -20.0]), -5.0
    assert S.sample(logits, keys_of_rows(2)).tolist() == [3 if u == 0 else 996, 7]


def test_rare_tokens_come():
    """A token of chance 1e-9 behind a common one, which a sum in fp32 would swallow."""
    logits, tail = torch.tensor([[0.0, -20.7, -20.7]]), math.exp(-20.7)
    with pytest.MonkeyPatch.context() as patch:
        for u, token in ((1 - 2.5 * tail, 0), (1 - 1.5 * tail, 1), (1 - 0.5 * tail, 2)):
            patch.setattr(S, "uniform", lambda rng, u=u: u)
            assert S.sample(logits, keys_of_rows(1)).tolist() == [token]


def test_a_uniform_is_the_key_and_does_not_advance_it():
    rng = fgpt.key(5)
    state = rng.get_state()
    assert S.uniform(rng) == S.uniform(rng) == S.uniform(fgpt.key(5))
    assert torch.equal(rng.get_state(), state)
    numbers = [S.uniform(fgpt.key(seed)) for seed in range(2000)]
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    assert len(set(numbers)) == 2000


def test_the_same_keys_draw_the_same_and_other_keys_another():
    logits, keys = torch.randn(64, 100, generator=fgpt.key(0)), keys_of_rows(64)
    drawn = S.sample(logits, keys)
    assert torch.equal(drawn, S.sample(logits, keys))
    assert torch.equal(drawn, S.sample(logits, keys_of_rows(64)))
    assert (drawn != S.sample(logits, keys_of_rows(64, seed=1))).sum() > 32


@given(sampling_cases(), st.data())
def test_neighbors_do_not_matter(case: SamplingCase, data: st.DataObject):
    """A row alone is the row in the batch, and permuted rows draw permuted tokens, through every filter."""
    sampling = S.SamplingParams(0.8, top_k=7, top_p=0.95, min_p=0.01, repetition_penalty=1.2, no_repeat_ngram=4)
    logits = torch.cat([case.logits, torch.zeros(len(case.texts), 300)], -1)  # so that no row can run out of tokens
    keys = keys_of_rows(len(case.texts))

    def draw_rows(order: list[int]) -> list[int]:
        allowed = sampling.logits_processor(logits[order], padded_texts([case.texts[i] for i in order]))
        return S.sample(allowed, [keys[i] for i in order]).tolist()

    together = draw_rows(list(range(len(keys))))
    order = data.draw(st.permutations(range(len(keys))))
    assert draw_rows(order) == [together[i] for i in order]
    assert [draw_rows([i])[0] for i in order] == [together[i] for i in order]


def test_without_keys_the_likeliest_comes():
    assert S.sample(torch.tensor([[0.0, 3.0, 1.0], [-1.0, -math.inf, -0.5], [2.0, 2.0, 0.0]]), None).tolist() == [
        1,
        2,
        0,
    ]
    assert S.SamplingParams() == S.GREEDY
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert torch.equal(
        S.SamplingParams(top_k=1, top_p=0.1, min_p=1.0).logits_processor(logits, padded_texts([[]])), logits
    )
