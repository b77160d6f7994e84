"""ROUGE-L against several references, as captions of images are scored.

    P = max_r LCS(text, r) / |text|,   R = max_r LCS(text, r) / |r|,   F = (1 + β²) P R / (R + β² P),   β = 1.2

P and R may be of different references. `fgpt compare` gives the F1 of one reference instead, which weighs both alike.

Source: Lin 2004, section 3.1; the maxima and β as in coco-caption (Chen et al. 2015, "Microsoft COCO Captions").
"""

from collections.abc import Sequence

from fgpt.cli.evaluation.metrics.reference_tokens import Tokens

BETA = 1.2


def mean_rouge_l(texts: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """The mean of F over the texts, 0 to 1.

    Args:
        texts: The tokens of each text.
        references: Those of the references of each text, one or more.

    >>> mean_rouge_l([("a", "b")], [[("a", "b")]]), mean_rouge_l([("a", "b")], [[("c",)]])
    (1.0, 0.0)
    """
    scores = [_f_measure(text, each) for text, each in zip(texts, references, strict=True)]
    return sum(scores) / len(scores)


def _f_measure(text: Tokens, references: Sequence[Tokens]) -> float:
    common = [longest_common_subsequence(text, reference) for reference in references]
    if not max(common):
        return 0.0
    precision = max(common) / len(text)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True) if reference)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common_subsequence(a: Tokens, b: Tokens) -> int:
    """The length of the longest sequence that both have in this order, with gaps.

    >>> longest_common_subsequence(("a", "b", "c", "d"), ("b", "x", "d"))
    2
    """
    lengths = [0] * (len(b) + 1)  # of the part of a so far and each beginning of b
    for token in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, lengths[j] = lengths[j], before + 1 if token == other else max(lengths[j], lengths[j - 1])
    return lengths[-1]
