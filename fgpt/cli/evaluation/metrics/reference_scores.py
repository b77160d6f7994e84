"""The five metrics of the E2E NLG challenge, of texts with several references each."""

from collections.abc import Sequence
from itertools import zip_longest

from fgpt.cli.console import console
from fgpt.cli.evaluation.metrics.caption_rouge import mean_rouge_l
from fgpt.cli.evaluation.metrics.cider import corpus_cider
from fgpt.cli.evaluation.metrics.meteor_jar import corpus_meteor, missing_for_meteor
from fgpt.cli.evaluation.metrics.nist import corpus_nist
from fgpt.cli.evaluation.metrics.reference_tokens import Tokens, caption_tokens, mteval_tokens


def challenge_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU, METEOR and ROUGE-L from 0 to 100, NIST and CIDEr as they are: the scales of Hu et al. 2021, table 3.

    METEOR is left out, and why is printed, where java or its package is missing or fails. The tokens are those of
    `reference_tokens`: no case, and for the last three no punctuation.

    Args:
        texts: One for each input.
        references: The references of each input, one or more.
    """
    tokens = [mteval_tokens(text) for text in texts]
    reference_tokens = [[mteval_tokens(reference) for reference in each] for each in references]
    scores = {"BLEU": corpus_bleu(texts, references), "NIST": corpus_nist(tokens, reference_tokens)}
    words = [caption_tokens(text) for text in texts]
    reference_words = [[caption_tokens(reference) for reference in each] for each in references]
    if (meteor := _meteor(words, reference_words)) is not None:
        scores["METEOR"] = 100 * meteor
    rouge, cider = mean_rouge_l(words, reference_words), corpus_cider(words, reference_words)
    return scores | {"ROUGE-L": 100 * rouge, "CIDEr": cider}


def _meteor(words: Sequence[Tokens], reference_words: Sequence[Sequence[Tokens]]) -> float | None:
    """METEOR; None, and why is printed, if it cannot be computed here: the other scores are as good without."""
    if missing := missing_for_meteor():
        console.print(f"METEOR is left out: it needs {' and '.join(missing)}")
        return None
    try:
        return corpus_meteor(words, reference_words)
    except (OSError, ValueError) as err:  # what pycocoevalcap makes of a Java program that ended
        console.print(f"METEOR is left out: its Java program failed ({err})", markup=False)
        return None


def corpus_bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of all texts together, 0 to 100, by sacrebleu: mteval-13a's tokens in lower case, the length of the
    nearest reference, no smoothing.

    Source: Papineni et al. 2002; Post 2018.

    >>> round(corpus_bleu(["a b c d e"], [["a b c d x", "y"]]), 2)  # (4/5 3/4 2/3 1/2)^(1/4)
    66.87
    """
    from sacrebleu.metrics.bleu import BLEU  # here, because it is slow to import

    columns = [list(column) for column in zip_longest(*references)]  # None where a text has fewer references
    return BLEU(lowercase=True, smooth_method="none").corpus_score(texts, columns).score
