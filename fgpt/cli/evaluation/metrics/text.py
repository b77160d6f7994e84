"""What can be said of a side's texts without a judge: how long, how they end, how they repeat, how likely they are.

Pure functions of texts. Words are those of `nano_score.words`: lower case, without punctuation. Shares are in percent.
"""

import math
from collections.abc import Sequence

from fgpt.cli.evaluation.metrics.nano import words
from fgpt.data.prompt_templates import Example
from fgpt.errors import InputError
from fgpt.evaluation.likelihood import Request, loglikelihood
from fgpt.model import GPT


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Every n words in a row of a text, from the left; none where it has fewer than n words."""
    said = words(text)
    return [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]


def repeated_ngrams(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that occurred before in it; 0 where it has none. A text that goes in circles has
    nearly 100.

    Source: Welleck et al. 2020, section 6 (seq-rep-n).
    """
    grams = ngrams(text, n)
    return 100 * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of all texts together, as a share of all their n-grams; 0 where there are none. No n-gram goes
    from one text into the next.

    Source: Li et al. 2016, section 5.3 (distinct-n).
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return 100 * len(set(grams)) / len(grams) if grams else 0.0


def mean(values: Sequence[float]) -> float:
    """Raises InputError for none."""
    if not values:
        raise InputError("the mean of no values: expected at least one answer")
    return sum(values) / len(values)


def nats(params: GPT, examples: Sequence[Example]) -> float:
    """Mean nats per token of the examples' answers, given their prompts: every token counts the same.

    Raises InputError where no example has a token to answer.
    """
    logprobs = [x for scored in loglikelihood(params, answers(examples)) for x in scored.logprobs]
    if not logprobs:
        raise InputError("no token to answer: expected examples that are longer than their prompts")
    return -math.fsum(logprobs) / len(logprobs)


def answers(examples: Sequence[Example]) -> list[Request]:
    """Prompts and answers, where there is a token to answer. The first token of all is predicted from nothing."""
    starts = [max(1, x.prompt_length) for x in examples]
    return [(x.tokens[:n], x.tokens[n:]) for x, n in zip(examples, starts, strict=True) if len(x.tokens) > n]


def perplexity(loss: float) -> float:
    """exp of mean nats per token; infinity where that is more than a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


def rouge_l(references: Sequence[str], texts: Sequence[str]) -> float:
    """Mean ROUGE-L F1 of texts against their references, 0 to 100.

    It reads letters a to z and digits alone: texts in other scripts score 0.

    Source: Lin 2004, section 3.1.
    """
    from rouge_score.rouge_scorer import RougeScorer  # here, because it is slow to import

    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, texts, strict=True)
    return mean([100 * scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs])
