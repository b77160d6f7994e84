"""The loss of a conversation's answers, turn by turn, is that of each answer by itself."""

import math

import pytest
from builders import tiny, tokens

from fgpt.cli.evaluation.metrics.text import nats, requests, response_losses
from fgpt.data.examples import Example, Span
from fgpt.evaluation.likelihood import loglikelihood

TEXTS = tokens(31, 3, 24).tolist()


def loss_of(context: list[int], answer: list[int]) -> tuple[float, int]:
    [likelihood] = loglikelihood(tiny(), [(context, answer)])
    return -likelihood.total, len(answer)


def test_each_turn_has_its_own_loss():
    examples = [
        Example(TEXTS[0], (Span(2, 5), Span(9, 13))),
        Example(TEXTS[1], (Span(0, 4, weight=0.5), Span(4, 4), Span(8, 24))),
    ]
    first = [loss_of(TEXTS[0][:2], TEXTS[0][2:5]), loss_of(TEXTS[1][:1], TEXTS[1][1:4])]
    second = [loss_of(TEXTS[0][:9], TEXTS[0][9:13]), loss_of(TEXTS[1][:8], TEXTS[1][8:24])]
    got = response_losses(examples, loglikelihood(tiny(), requests(examples)))
    for name, answers in {
        "response loss (nats per token)": first + second,
        "loss of response 1": first,
        "loss of response 2": second,
    }.items():
        assert got.pop(name) == pytest.approx(math.fsum(x for x, _ in answers) / sum(n for _, n in answers), rel=1e-5)
    assert not got


def test_late_turns_are_one_and_single_answers_have_no_turns():
    turns = Example(TEXTS[0], tuple(Span(i, i + 1) for i in range(1, 22, 3)))
    names = list(response_losses([turns], loglikelihood(tiny(), requests([turns]))))[1:]
    assert names == [f"loss of response {turn}" for turn in ("1", "2", "3", "4", "5 and later")]
    single = Example(TEXTS[0], (Span(2, 5),))
    losses = response_losses([single], loglikelihood(tiny(), requests([single])))
    assert losses == {"response loss (nats per token)": pytest.approx(nats(tiny(), [single]))}
