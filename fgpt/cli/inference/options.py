"""Options of `fgpt generate`, `fgpt chat` and `fgpt compare`."""

from dataclasses import dataclass

from tyro.conf import OmitArgPrefixes

from fgpt.generation.beam import LengthPenalty
from fgpt.generation.sampling import GREEDY, SamplingParams
from fgpt.ranges import BatchSize, PositiveInt, Seed


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate."""

    max_new_tokens: PositiveInt = 200
    """At most N new tokens."""
    sampling: OmitArgPrefixes[SamplingParams] = GREEDY
    num_beams: BatchSize = 1
    """Above 1, beam search: its most likely texts."""
    length_penalty: LengthPenalty = 1.0
    """Beam search divides log-probabilities by the length to this power."""
    num_return_sequences: BatchSize = 1
    """Texts to generate."""
    stop: tuple[str, ...] = ()
    """Strings that end a text; they are not part of it."""
    seed: Seed = 0
    compile: bool = False
    """Compile the decode step, which takes half a minute the first time: each token is then faster. Needs a C++
    compiler."""


@dataclass(frozen=True)
class DocumentOptions:
    """Where passages come from."""

    documents: str | None = None
    """An index of documents, made by fgpt index: the passages nearest to a question are put into its prompt."""
    num_passages: BatchSize = 3
    """Passages for a question, at most; those that do not fit are dropped from the end."""


DEFAULT_DOCUMENTS = DocumentOptions()
"""No passages."""

DEFAULT_SAMPLING = GenerationOptions()
"""One text, greedy decoding."""


@dataclass(frozen=True)
class ComparisonDecoding:
    """How every model of a comparison generates: with the same options, and the same key for the same prompt."""

    max_new_tokens: PositiveInt | None = None
    """At most N new tokens; None takes the first run's."""
    sampling: OmitArgPrefixes[SamplingParams] = GREEDY
    seed: Seed = 0


DEFAULT_DECODING = ComparisonDecoding()
"""Greedy decoding."""
