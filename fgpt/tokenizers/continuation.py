"""The tokens of a text after another: tokenizers treat the beginning of a text in different ways."""

from collections.abc import Callable


def continuation_tokens(encode: Callable[[str], list[int]], context: str, text: str) -> list[int]:
    """The tokens of `text` after `context`: those of both together, without those of `context` alone.

    A tokenizer that inserts a space before every text inserts none before a continuation. If a token crosses the
    boundary, `text` is encoded alone.

    >>> continuation_tokens(lambda text: [ord(c) for c in text], "ab", "cd")
    [99, 100]
    """
    context_tokens, both = encode(context), encode(context + text)
    if both[: len(context_tokens)] == context_tokens:
        return both[len(context_tokens) :]
    return encode(text)
