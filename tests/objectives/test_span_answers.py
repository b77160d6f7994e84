"""A span is the best of all, is learned if it is better than what was sampled, and has the advantage of its reward."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgpt.errors import InputError
from fgpt.objectives.grpo import group_advantages
from fgpt.objectives.span_answers import SpanAnswer, advantages_with_spans, best_span, better_spans

WORDS = st.lists(st.sampled_from(["a", "b", "c.", "dd"]), max_size=8)


def value(span: str) -> float:
    """Ties and negative numbers among them."""
    return float(hash((span.count("a"), span.count("b"), len(span) // 3)) % 5 - 2)


@given(WORDS, st.integers(1, 9))
def test_no_span_is_better(words: list[str], longest: int):
    best = best_span(value, "  ".join(words), longest)
    every = [words[i:j] for i in range(len(words)) for j in range(i + 1, min(i + longest, len(words)) + 1)]
    if not every:
        assert best is None
        return
    assert best is not None
    most = max(value(" ".join(span)) for span in every)
    shortest = min(len(span) for span in every if value(" ".join(span)) == most)
    first = next(" ".join(span) for span in every if len(span) == shortest and value(" ".join(span)) == most)
    assert best == SpanAnswer(first, most)


def test_each_span_is_judged_once():
    calls = Counter[str]()

    def count(span: str) -> float:
        calls[span] += 1
        return 0.0

    best_span(count, "a b a b a", 2)
    assert calls == {"a": 1, "b": 1, "a b": 1, "b a": 1}


def test_a_span_no_better_than_the_samples_is_none():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.5], [0.0, 0.0]])
    found = better_spans(
        lambda row, answer, done: float(done and answer == row), ["x", "x", "x"], ["x", "x", ""], 1, rewards
    )
    assert found == [None, SpanAnswer("x", 1.0), None]


@pytest.mark.parametrize("reward", [0.7, 0.9, 1 / 3])
def test_a_span_equal_to_a_sample_is_no_better(reward: float):
    """Also where the nearest fp32 is below the number: 0.7 and 0.9."""
    assert better_spans(lambda row, answer, done: reward, ["x"], ["x"], 1, torch.tensor([[0.0, reward]])) == [None]


def test_a_span_has_to_fit():
    """The best that fits, even if a better one does not; the better one is not an answer that is too long."""
    assert best_span(len, "a bb ccc", 3, fits=lambda span: len(span) < 5) == SpanAnswer("a bb", 4)
    assert best_span(len, "a bb ccc", 3, fits=lambda span: False) is None
    rewards = torch.tensor([[0.0, 2.0]])
    found = better_spans(lambda row, answer, done: len(answer), ["x"], ["bb a"], 2, rewards, fits=lambda x: len(x) < 3)
    assert found == [None]  # "bb a" would be better than 2


def test_a_reward_of_a_span_is_a_number():
    with pytest.raises(InputError, match="a reward is nan"):
        best_span(lambda span: math.nan, "a", 1)


def test_advantages_worked_by_hand():
    """Of rewards 0, 0, 0 and a span of 1: mean 0, deviation of all 0.5."""
    (with_span,) = advantages_with_spans(torch.zeros(1, 3), [SpanAnswer("x", 1.0)])
    assert with_span == pytest.approx([0, 0, 0, 1 / 0.5001])
    (mixed,) = advantages_with_spans(torch.tensor([[0.2, 0.4]]), [SpanAnswer("x", 0.9)])
    deviation = torch.tensor([0.2, 0.4, 0.9]).std().item() + 1e-4
    assert mixed == pytest.approx([-0.1 / deviation, 0.1 / deviation, 0.6 / deviation])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), st.booleans())
def test_without_a_span_they_are_those_of_the_group(rewards: list[float], scale: bool):
    group = torch.tensor([rewards])
    assert advantages_with_spans(group, [None], scale=scale) == group_advantages(group, scale=scale).tolist()
    better = SpanAnswer("x", max(rewards) + 0.1)
    (of_all,) = advantages_with_spans(group, [better], scale=scale)
    assert of_all[-1] > max(of_all[:-1])
    assert of_all[-1] > 0
    assert sum(of_all[:-1]) == pytest.approx(0, abs=1e-3)
