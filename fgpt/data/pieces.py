"""Pieces: an example as text, in parts that carry loss and parts that do not. The tokens are made from them."""

from collections.abc import Sequence
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
    """The example of each list of pieces.

    >>> from fgpt.io.models import tokenizer
    >>> nano = tokenizer("nano")
    >>> example, = encode_pieces([[Piece("Hi"), Piece("Yes", 1.0), Piece("", 1.0, tokens=(nano.eos_token_id,))]], nano)
    >>> nano.decode(example.tokens), len(example.spans)
    ('HiYes<|endoftext|>', 1)
    """
    return [_encode(pieces, tokenizer) for pieces in examples]


def _encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Example:
    tokens: list[int] = []
    spans: list[Span] = []
    for piece in pieces:
        start = len(tokens)
        tokens += piece_tokens(piece, tokenizer)
        if piece.weight == 0 or start == len(tokens):
            continue
        if spans and spans[-1].end == start and spans[-1].weight == piece.weight:
            spans[-1] = spans[-1]._replace(end=len(tokens))
        else:
            spans.append(Span(start, len(tokens), piece.weight))
    return Example(tuple(tokens), tuple(spans))


def piece_tokens(piece: Piece, tokenizer: Tokenizer) -> Sequence[int]:
    """The tokens of a piece."""
    if piece.tokens is not None:
        return piece.tokens
    if piece.has_special:
        return tokenizer.encode_special(piece.text, add_special_tokens=False)
    return tokenizer.encode(piece.text)
