"""Pieces: an example as text, in parts that carry loss and parts that do not. The tokens are made from them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fgpt.data.examples import Example, Span
from fgpt.tokenizers.tokenizer_files import Tokenizer


class Piece(NamedTuple):
    """A part of a text that is tokenized by itself: no token crosses its bounds."""

    text: str
    weight: float = 0.0
    """The weight of each of its tokens in the loss; 0 for context."""
    has_special: bool = False
    """Special tokens in the text are recognized, as in the text that a chat template writes."""
    tokens: tuple[int, ...] | None = None
    """Its tokens, where they are not those of `text`, such as an end-of-sequence token."""


def encode_pieces(examples: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> list[Example]:
    """The example of each list of pieces. All texts are tokenized in one batch, equal ones once.

    >>> from fgpt.io.models import tokenizer
    >>> nano = tokenizer("nano")
    >>> example, = encode_pieces([[Piece("Hi"), Piece("Yes", 1.0), Piece("", 1.0, tokens=(nano.eos_token_id,))]], nano)
    >>> nano.decode(example.tokens), len(example.spans)
    ('HiYes<|endoftext|>', 1)
    """
    tokens_of: dict[tuple[str, bool], Sequence[int]] = {}
    for has_special in (False, True):
        texts = dict.fromkeys(
            piece.text
            for pieces in examples
            for piece in pieces
            if piece.tokens is None and piece.has_special == has_special
        )
        batch = tokenizer.encode_batch(list(texts), has_special=has_special) if texts else []
        tokens_of.update(((text, has_special), tokens) for text, tokens in zip(texts, batch, strict=True))
    return [_example(pieces, tokens_of) for pieces in examples]


def _example(pieces: Sequence[Piece], tokens_of: Mapping[tuple[str, bool], Sequence[int]]) -> Example:
    tokens: list[int] = []
    spans: list[Span] = []
    for piece in pieces:
        start = len(tokens)
        tokens += tokens_of[piece.text, piece.has_special] if piece.tokens is None else piece.tokens
        if piece.weight == 0 or start == len(tokens):
            continue
        if spans and spans[-1].end == start and spans[-1].weight == piece.weight:
            spans[-1] = spans[-1]._replace(end=len(tokens))
        else:
            spans.append(Span(start, len(tokens), piece.weight))
    return Example(tuple(tokens), tuple(spans))
