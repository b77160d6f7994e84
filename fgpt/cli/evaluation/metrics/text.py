"""Metrics of texts: repetition, diversity, likelihood, overlap with references.

Words are those of `nano.words`: lower case, without punctuation. Shares are in percent.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from fgpt.cli.evaluation.metrics.nano import words
from fgpt.data.examples import Example
from fgpt.distributed import world
from fgpt.errors import InputError
from fgpt.evaluation.likelihood import LogLikelihood, Request, loglikelihood
from fgpt.model import GPT


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Every n words in a row of a text, from the left; none if it has fewer than n words."""
    all_words = words(text)
    return [tuple(all_words[i : i + n]) for i in range(len(all_words) - n + 1)]


def repeated_ngrams(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that occurred before in it; 0 if it has none. A text that repeats itself all
    the time has nearly 100.

    Source: Welleck et al. 2020, section 6 (seq-rep-n).
    """
    grams = ngrams(text, n)
    return 100 * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of all texts together, as a share of all their n-grams; 0 if there are none. No n-gram spans
    two texts.

    Source: Li et al. 2016, section 5.3 (distinct-n).
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return 100 * len(set(grams)) / len(grams) if grams else 0.0


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean. Raises InputError if there are no values."""
    if not values:
        raise InputError("the mean of no values: expected at least one answer")
    return sum(values) / len(values)


def nats(params: GPT, examples: Sequence[Example]) -> float:
    """Mean nats per token of the examples' answers, given their prompts: every token counts the same.

    Raises InputError if no example has an answer token.
    """
    return _mean_nats(loglikelihood(params, requests(examples), world=world()))


def _mean_nats(likelihoods: Sequence[LogLikelihood]) -> float:
    logprobs = [x for likelihood in likelihoods for x in likelihood.logprobs]
    if not logprobs:
        raise InputError("no answer token: expected examples that are longer than their prompts")
    return -math.fsum(logprobs) / len(logprobs)


def response_losses(likelihoods: Sequence[LogLikelihood], turns: Sequence[int]) -> dict[str, float]:
    """The loss of answers by name: of all, and in conversations of the first answers, the second ones .. by themselves.

    Args:
        likelihoods: Of each answer.
        turns: The number of each answer in its conversation, from 1.

    Raises InputError if no answer has a token.
    """
    losses = {RESPONSE_LOSS: _mean_nats(likelihoods)}
    by_turn: dict[int, list[LogLikelihood]] = defaultdict(list)
    for turn, likelihood in zip(turns, likelihoods, strict=True):
        by_turn[min(turn, LATER)].append(likelihood)
    if len(by_turn) > 1:
        for turn in sorted(by_turn):
            name = f"loss of response {turn}" + (" and later" if turn == LATER else "")
            losses[name] = _mean_nats(by_turn[turn])
    return losses


RESPONSE_LOSS = "response loss (nats per token)"
"""The loss of all answers."""
LATER = 5
"""From this answer of a conversation on, losses are not told apart."""


def requests(examples: Sequence[Example]) -> list[Request]:
    """Each answer after all that precedes it, if the answer has a token. The first token of an example is never
    predicted.
    """
    pairs: list[Request] = []
    for example in examples:
        for start, end, _ in example.spans:
            if end > (begin := max(1, start)):
                pairs.append((example.tokens[:begin], example.tokens[begin:end]))
    return pairs


def perplexity(loss: float) -> float:
    """exp of mean nats per token; infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def rouge_l(references: Sequence[str], texts: Sequence[str]) -> float:
    """Mean ROUGE-L F1 of texts against their references, 0 to 100.

    Only letters a to z and digits count: texts in other scripts score 0.

    Source: Lin 2004, section 3.1.
    """
    from rouge_score.rouge_scorer import RougeScorer  # here, because it is slow to import

    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, texts, strict=True)
    return mean([100 * scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs])
