"""NIST: n-grams shared with the references, each counted by its information.

    NIST = exp(β ln² min(1, L / L̄)) Σ_n Σ_{g shared} info(g) / #n-grams of the texts,   β = ln ½ / ln² 1½
    info(w₁ .. wₙ) = log₂ count(w₁ .. wₙ₋₁) / count(w₁ .. wₙ)                          counts over all references

L are the tokens of the texts, L̄ those of the references, of each text their mean. An n-gram is shared as often as it
occurs in the text, but no more than in the reference that has it most.

Source: Doddington 2002, sections 3 and 4; several references as in the E2E challenge's e2e-metrics.
"""

import math
from collections import Counter
from collections.abc import Sequence

from fgpt.cli.evaluation.metrics.reference_tokens import NGrams, Tokens, most_in_any, ngram_counts

BETA = math.log(0.5) / math.log(1.5) ** 2


def corpus_nist(texts: Sequence[Tokens], references: Sequence[Sequence[Tokens]], max_n: int = 5) -> float:
    """The NIST score of texts, from 0, without a bound above.

    Args:
        texts: The tokens of each text.
        references: Those of the references of each text, one or more.
        max_n: The longest n-grams.

    >>> corpus_nist([("a", "b")], [[("a", "c")]])  # of two tokens, a has one bit: log2(2 / 1)
    0.5
    """
    counts = _reference_counts(references, max_n)
    total = 0.0
    for n in range(1, max_n + 1):
        information, num_ngrams = 0.0, 0
        for text, text_references in zip(texts, references, strict=True):
            ngrams = ngram_counts(text, n)
            num_ngrams += ngrams.total()
            for ngram, count in (ngrams & most_in_any(text_references, n)).items():
                information += count * math.log2(counts[ngram[:-1]] / counts[ngram])
        total += information / num_ngrams if num_ngrams else 0.0
    length = sum(map(len, texts))
    mean_length = sum(sum(map(len, each)) / len(each) for each in references)
    return total * _brevity_penalty(length, mean_length)


def _reference_counts(references: Sequence[Sequence[Tokens]], max_n: int) -> NGrams:
    """How often each n-gram occurs in all references; the empty one as often as there are tokens."""
    counts: NGrams = Counter()
    for reference in (reference for each in references for reference in each):
        counts[()] += len(reference)
        for n in range(1, max_n + 1):
            counts.update(ngram_counts(reference, n))
    return counts


def _brevity_penalty(length: int, mean_length: float) -> float:
    if not length:
        return 0.0
    return math.exp(BETA * math.log(min(1.0, length / mean_length)) ** 2)
