"""CIDEr-D: the cosine between the tf-idf vectors of a text's n-grams and those of each reference.

    CIDEr-D = 10 · mean over texts, references and n = 1 .. 4 of
              exp(-(|text| - |ref|)² / 2σ²) · min(v, w) · w / (‖v‖ ‖w‖),          σ = 6
    v[g] = count of g in the text · ln(number of texts / texts of whose references one has g),  w likewise

It is what coco-caption and the E2E challenge call CIDEr. A text's vector is clipped at the reference's, so that
repetition gains nothing.

Source: Vedantam et al. 2015, sections 4 and 6. coco-caption's lengths are counts of bigrams.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from fgpt.cli.evaluation.metrics.reference_tokens import NGrams, Tokens, most_in_any, ngram_counts

MAX_N, SIGMA = 4, 6.0


class Vector(NamedTuple):
    """The tf-idf vectors of a text."""

    weights: list[dict[Tokens, float]]
    """Of its n-grams, for n = 1 .. MAX_N."""
    norms: list[float]
    length: int


def corpus_cider(texts: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """CIDEr-D of texts, 0 to 10. Of a single text it is 0: no n-gram tells it from another.

    Args:
        texts: The tokens of each text.
        references: Those of the references of each text, one or more.

    >>> corpus_cider([("a", "b", "c", "d"), ("e",)], [[("a", "b", "c", "d")], [("f",)]])
    5.0
    """
    document_frequency: NGrams = Counter()
    for each in references:
        document_frequency.update({ngram for n in _orders() for ngram in most_in_any(each, n)})
    scores: list[float] = []
    for text, each in zip(texts, references, strict=True):
        vector = _vector(text, document_frequency, len(texts))
        similarities = [_similarity(vector, _vector(reference, document_frequency, len(texts))) for reference in each]
        scores.append(10 * sum(similarities) / len(similarities))
    return sum(scores) / len(scores)


def _orders() -> range:
    return range(1, MAX_N + 1)


def _vector(tokens: Tokens, document_frequency: NGrams, num_texts: int) -> Vector:
    weights: list[dict[Tokens, float]] = []
    for n in _orders():
        counts = ngram_counts(tokens, n).items()
        weights.append({x: count * math.log(num_texts / max(1, document_frequency[x])) for x, count in counts})
    norms = [math.hypot(*each.values()) for each in weights]
    return Vector(weights, norms, max(0, len(tokens) - 1))


def _similarity(text: Vector, reference: Vector) -> float:
    """Of one text and one reference, 0 to 1."""
    total = 0.0
    for v, w, v_norm, w_norm in zip(text.weights, reference.weights, text.norms, reference.norms, strict=True):
        product = sum(min(weight, w[ngram]) * w[ngram] for ngram, weight in v.items() if ngram in w)
        if product:
            total += product / (v_norm * w_norm)
    return math.exp(-((text.length - reference.length) ** 2) / (2 * SIGMA**2)) * total / MAX_N
