"""METEOR 1.5, by its authors' Java program, which the package pycocoevalcap brings with its table of paraphrases.

There is no other METEOR 1.5. nltk's is that of 2005, without paraphrases and with other weights; it needs WordNet.

Source: Denkowski & Lavie 2014, "Meteor Universal".
"""

import shutil
from collections.abc import Sequence
from importlib.util import find_spec

from fgpt.cli.evaluation.metrics.reference_tokens import Tokens


def missing_for_meteor() -> list[str]:
    """What METEOR needs and is not there."""
    package = [] if find_spec("pycocoevalcap") else ["the package pycocoevalcap"]
    return package if shutil.which("java") else [*package, "java"]


def corpus_meteor(texts: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """METEOR of all texts together, 0 to 1.

    Args:
        texts: The tokens of each text.
        references: Those of the references of each text, one or more.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    words = {i: [" ".join(text)] for i, text in enumerate(texts)}
    reference_words = {i: [" ".join(reference) for reference in each] for i, each in enumerate(references)}
    score, _ = Meteor().compute_score(reference_words, words)
    return score
