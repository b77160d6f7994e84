"""An example: tokens, and the spans of them that are trained on."""

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """Tokens `start` to `end` (excluded) of an example. Each is predicted, with this weight in the loss."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Example:
    """A text as tokens, such as a prompt with its answer, or a conversation.

    >>> Example((5, 6, 7, 8), (Span(1, 2), Span(3, 4))).num_loss_tokens
    2
    """

    tokens: Sequence[int]
    spans: tuple[Span, ...]
    """What is trained on, in order and without overlap; everything else is context. The first token of a text is never
    predicted. A label is token `len(tokens)`."""
    label: int | None = None
    """What the last token predicts, if that is not a token of the text: its class, or the one token of its class."""

    @classmethod
    def completion(cls, tokens: Sequence[int], prompt_length: int, weight: float = 1.0) -> "Example":
        """A prompt and its answer.

        Args:
            tokens: Those of the prompt, the answer and the end of sequence.
            prompt_length: Tokens of the prompt, which carry no loss.
            weight: The weight of each token of the answer in the loss.

        >>> Example.completion((5, 6, 7), prompt_length=1).spans
        (Span(start=1, end=3, weight=1.0),)
        """
        spans = (Span(prompt_length, len(tokens), weight),) if prompt_length < len(tokens) else ()
        return cls(tokens, spans)

    @classmethod
    def classification(cls, tokens: Sequence[int], label: int) -> "Example":
        """A text whose last token predicts its class, or the token of its class.

        >>> Example.classification((5, 6), label=0).spans
        (Span(start=2, end=3, weight=1.0),)
        """
        return cls(tokens, (Span(len(tokens), len(tokens) + 1),), label)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first that is trained on."""
        return self.spans[0].start if self.spans else len(self.tokens)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are predicted with a weight, a label included."""
        return sum(max(1, end) - max(1, start) for start, end, _ in self.spans)


def truncate(example: Example, max_seq_len: int) -> Example:
    """An example of at most `max_seq_len` tokens. A long one keeps its beginning, without the end-of-sequence token and
    later answers. If there is no space for two tokens of the first answer, the example is returned
    as it is, for `filter_by_length` to reject.
    """
    if len(example.tokens) <= max_seq_len or example.prompt_length > max_seq_len - 2:
        return example
    spans = [span._replace(end=min(span.end, max_seq_len)) for span in example.spans if span.start < max_seq_len]
    return replace(example, tokens=example.tokens[:max_seq_len], spans=tuple(spans))


def split_text(example: Example, max_seq_len: int) -> list[Example]:
    """Raw text as consecutive examples of at most `max_seq_len` tokens; any other example as it is.

    An example is raw text if it has no prompt: its first token would be predicted, too, if there were one before it.
    Each part begins with the last token of the part before it, so that every token but the first is predicted once.

    >>> [part.tokens for part in split_text(Example((5, 6, 7, 8, 9), (Span(0, 5),)), 3)]
    [(5, 6, 7), (7, 8, 9)]
    """
    length = len(example.tokens)
    is_text = len(example.spans) == 1 and example.spans[0][:2] == (0, length)
    if length <= max_seq_len or not is_text or max_seq_len < 2:
        return [example]
    starts = range(0, length - 1, max_seq_len - 1)
    parts = [example.tokens[start : start + max_seq_len] for start in starts]
    return [Example(part, (Span(0, len(part), example.spans[0].weight),)) for part in parts]


class LazyExamples(Sequence[Example]):
    """Examples that are read when they are asked for. What is known of all of them is not read example by example."""

    lengths: np.ndarray
    """Tokens of each, int64."""

    @property
    @abstractmethod
    def with_answer(self) -> np.ndarray:
        """Whether more is trained on than an end-of-sequence token, bool."""

    @property
    @abstractmethod
    def num_loss_tokens(self) -> int:
        """The sum of their `Example.num_loss_tokens`."""

    @abstractmethod
    def take(self, indices: np.ndarray) -> "LazyExamples":
        """Those at `indices`."""

    @abstractmethod
    def arrays(self) -> Iterator[np.ndarray]:
        """As `example_arrays`."""


def example_lengths(examples: Sequence[Example]) -> np.ndarray:
    """The number of tokens of each example, int64."""
    if isinstance(examples, LazyExamples):
        return examples.lengths
    return np.fromiter((len(x.tokens) for x in examples), np.int64, len(examples))


def with_answer(examples: Sequence[Example]) -> np.ndarray:
    """Whether each example has a label, or more to train on than an end-of-sequence token, bool."""
    if isinstance(examples, LazyExamples):
        return examples.with_answer
    has_answer = (x.label is not None or sum(end - start for start, end, _ in x.spans) > 1 for x in examples)
    return np.fromiter(has_answer, bool, len(examples))


def count_loss_tokens(examples: Sequence[Example]) -> int:
    """The sum of their `Example.num_loss_tokens`."""
    if isinstance(examples, LazyExamples):
        return examples.num_loss_tokens
    return sum(example.num_loss_tokens for example in examples)


def take(examples: Sequence[Example], indices: np.ndarray) -> Sequence[Example]:
    """The examples at `indices`."""
    if isinstance(examples, LazyExamples):
        return examples.take(indices)
    return [examples[i] for i in indices.tolist()]


def example_arrays(examples: Sequence[Example]) -> Iterator[np.ndarray]:
    """All that the examples hold: lengths, labels, spans and at last the tokens, which may come in parts. The bytes are
    the same for equal examples, in memory or on disk.
    """
    if isinstance(examples, LazyExamples):
        yield from examples.arrays()
        return
    spans = [span for example in examples for span in example.spans]
    yield example_lengths(examples)
    yield np.array([-1 if x.label is None else x.label for x in examples], np.int64)
    yield np.array([len(x.spans) for x in examples], np.int64)
    yield np.array([(start, end) for start, end, _ in spans], np.int64)
    yield np.array([weight for *_, weight in spans], np.float64)
    yield np.fromiter(itertools.chain.from_iterable(x.tokens for x in examples), np.int32)
