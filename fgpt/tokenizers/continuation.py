"""A text's tokens where it stands behind another: tokenizers differ in what they do at the beginning of a text."""

from collections.abc import Callable


def continuation(read: Callable[[str], list[int]], context: str, text: str) -> list[int]:
    """The tokens of `text` where it follows `context`: what the tokens of both have beyond those of `context` alone.

    A tokenizer that puts a blank before every text puts none before the part. Where a token reaches across the border,
    `text` is read alone.
    """
    alone, both = read(context), read(context + text)
    return both[len(alone) :] if both[: len(alone)] == alone else read(text)
