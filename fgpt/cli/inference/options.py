"""How a trained run is to write: the options of `just generate` and `just chat`, and of `just compare`."""

from dataclasses import dataclass

from tyro.conf import OmitArgPrefixes

from fgpt.generation.beam import LengthPenalty
from fgpt.generation.sampling import GREEDY, SamplingParams
from fgpt.ranges import BatchSize, PositiveInt, Seed


@dataclass(frozen=True)
class GenerationOptions:
    """How to write."""

    max_new_tokens: PositiveInt = 200
    """Most new tokens."""
    sampling: OmitArgPrefixes[SamplingParams] = GREEDY
    num_beams: BatchSize = 1
    """Above 1, beam search: the likeliest of the texts it finds."""
    length_penalty: LengthPenalty = 1.0
    """Of beam search: log-probabilities are divided by the length to this power."""
    num_return_sequences: BatchSize = 1
    """Texts to write."""
    stop: tuple[str, ...] = ()
    """Strings that end a text, and are no part of it."""
    seed: Seed = 0
    compile: bool = False
    """Compile the step, which takes half a minute the first time: on a CPU the text then comes twice as fast or more.
    Needs a C++ compiler."""


DEFAULT_SAMPLING = GenerationOptions()
"""One text, the likeliest token each time."""


@dataclass(frozen=True)
class ComparisonDecoding:
    """How every side of a comparison is to write: by the same rule, and by the same key for the same prompt."""

    max_new_tokens: PositiveInt | None = None
    """Most new tokens of an answer; None takes the first run's."""
    sampling: OmitArgPrefixes[SamplingParams] = GREEDY
    seed: Seed = 0


DEFAULT_DECODING = ComparisonDecoding()
"""The likeliest token each time."""
