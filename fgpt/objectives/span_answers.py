"""Answers that a search finds where sampling finds none: of all spans of a text, the one with the highest reward.

    a* = argmax of reward(a) over all spans a of the text

If its reward is above those of the group that was sampled, it is learned as one more answer of the group. A base model
that has never answered a question hardly ever samples an answer, so that rewards alone teach it nothing. Where the
answer stands in the text that is asked about, the search costs no model, and no answer is shown: the reward judges
spans as it judges samples.

Source: Oh et al. 2018 (Self-Imitation Learning), section 3: an action is imitated if its return is above
what was expected. There it is the agent's own, of the past.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.objectives.grpo import group_advantages
from fgpt.objectives.rollouts import RewardFunction, check_reward


class SpanAnswer(NamedTuple):
    """A span of a text as an answer, and its reward."""

    text: str
    reward: float


def best_span(
    reward: Callable[[str], float], text: str, max_words: int, *, fits: Callable[[str], bool] | None = None
) -> SpanAnswer | None:
    """The span of up to `max_words` words with the highest reward, of equal ones the shortest, then the first; None of
    a text in which no span fits.

    Args:
        reward: A function of an answer, which is called once for each different span: max_words times the words of the
            text, at most.
        text: Such as what a question is asked about.
        max_words: Of the longest span; words are what white space separates, and a span has one space in its place.
        fits: Whether a span may be an answer, such as one of few enough tokens; asked only of spans that are better
            than the best so far. None: every span may.

    Raises:
        InputError: for a reward that is not a finite number.

    >>> best_span(lambda answer: float("zoo" in answer), "Kate went to the zoo.", max_words=3)
    SpanAnswer(text='zoo.', reward=1.0)
    """
    words, distinct = text.split(), set[str]()
    best: SpanAnswer | None = None
    for length in range(1, min(max_words, len(words)) + 1):
        for start in range(len(words) - length + 1):
            span = " ".join(words[start : start + length])
            if span in distinct:
                continue
            distinct.add(span)
            value = check_reward(reward(span))
            if (best is None or value > best.reward) and (fits is None or fits(span)):
                best = SpanAnswer(span, value)
    return best


def better_spans(
    reward: RewardFunction,
    rows: Sequence[Any],
    texts: Sequence[str],
    max_words: int,
    rewards: Float[Tensor, "groups answers"],
    *,
    fits: Callable[[str], bool] | None = None,
) -> list[SpanAnswer | None]:
    """The best span of each text, if its reward as a finished answer is above those of all sampled ones, in the
    precision of `rewards`; else None.

    Args:
        reward: From a row, an answer and whether it is finished to a number.
        rows: What each prompt was made from.
        texts: Of each row, what is searched.
        max_words: Of the longest span.
        rewards: Of the sampled answers.
        fits: As `best_span` takes it.

    Raises:
        InputError: for a reward that is not a finite number.

    >>> def reward(row, answer, finished):
    ...     return float(answer == row)
    >>> better_spans(reward, ["a", "b"], ["c a d", "c a d"], 2, torch.zeros(2, 4))
    [SpanAnswer(text='a', reward=1.0), None]
    """
    spans: list[SpanAnswer | None] = []
    for row, text, best_sampled in zip(rows, texts, rewards.amax(-1), strict=True):
        best = best_span(partial(_finished_reward, reward, row), text, max_words, fits=fits)
        # In fp32, as the samples: there 0.7 is less than 0.7 in Python, and a span equal to a sample would be better.
        spans.append(best if best is not None and rewards.new_tensor(best.reward) > best_sampled else None)
    return spans


def _finished_reward(reward: RewardFunction, row: Any, answer: str) -> float:
    return reward(row, answer, True)


def advantages_with_spans(
    rewards: Float[Tensor, "groups answers"], spans: Sequence[SpanAnswer | None], *, scale: bool = True
) -> list[list[float]]:
    """The advantages of the sampled answers of each group, and of its span, if it has one:

        (reward - mean of the sampled ones) / (standard deviation of all + 1e-4)

    What was sampled says what is to be expected; so a span, which is above all that was, never has a negative one.

    Args:
        rewards: Of the sampled answers.
        spans: Of each group, as `better_spans` gives them.
        scale: Divide by the standard deviation.

    Raises:
        InputError: as `group_advantages` does.

    >>> advantages_with_spans(torch.zeros(2, 3), [SpanAnswer("zoo", 1.0), None], scale=False)
    [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    plain = group_advantages(rewards, scale=scale)
    result: list[list[float]] = []
    for of_group, span, without in zip(rewards, spans, plain, strict=True):
        if span is None:
            result.append(without.tolist())
            continue
        together = torch.cat([of_group, of_group.new_tensor([span.reward])])
        centered = together - of_group.mean()
        result.append((centered / (together.std() + 1e-4) if scale else centered).tolist())
    return result
