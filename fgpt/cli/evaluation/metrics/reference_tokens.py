"""Texts and their references as tokens: as mteval-13a splits them, in lower case.

The E2E challenge scores BLEU and NIST on these tokens, and METEOR, ROUGE-L and CIDEr on those of Stanford's PTB
tokenizer, a Java program, without punctuation. Here the latter are mteval's without punctuation, with contractions,
ranges and prices as PTB splits them: 4,635 of the 4,693 references of the challenge's test set have the same tokens.
The others differ in single quotation marks and in hyphens after a digit, 5-star.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

Tokens: TypeAlias = tuple[str, ...]
NGrams: TypeAlias = Counter[Tokens]

PUNCTUATION = frozenset(["''", "'", "``", "`", "(", ")", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'])
"""What the challenge removes, after the PTB's own names of brackets and quotation marks."""
CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
CURRENCY = re.compile(r"([£$])(?=\d)")
RANGE = re.compile(r"(?<=\d) - (?=\d)")
"""20-25, as mteval splits it."""


@lru_cache(maxsize=1)
def _tokenizer():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a  # here, because it is slow to import

    return Tokenizer13a()


def mteval_tokens(text: str) -> Tokens:
    """The tokens of mteval-13a in lower case.

    >>> mteval_tokens("The price is £20.50, isn't it?")
    ('the', 'price', 'is', '£20.50', ',', "isn't", 'it', '?')
    """
    return tuple(_tokenizer()(text).lower().split())


def caption_tokens(text: str) -> Tokens:
    """The tokens for the metrics of image captions: no punctuation, contractions split, 20-25 in one.

    >>> caption_tokens("Isn't it (really) cheap?")
    ('is', "n't", 'it', 'really', 'cheap')
    """
    joined = RANGE.sub("-", " ".join(mteval_tokens(text)))
    words = CURRENCY.sub(r"\1 ", CONTRACTION.sub(r" \1", joined)).split()
    return tuple(word for word in words if word not in PUNCTUATION)


def ngram_counts(tokens: Tokens, n: int) -> NGrams:
    """How often each n tokens in a row occur.

    >>> ngram_counts(("a", "b", "a", "b"), 2)[("a", "b")]
    2
    """
    return Counter(tokens[i : i + n] for i in range(len(tokens) - n + 1))


def most_in_any(references: Sequence[Tokens], n: int) -> NGrams:
    """The largest count of each n-gram in one of the references."""
    counts: NGrams = Counter()
    for reference in references:
        counts |= ngram_counts(reference, n)
    return counts
