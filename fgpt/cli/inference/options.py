"""How a trained run is to write: the options of `just generate` and `just chat`, and of `just compare`."""

from dataclasses import dataclass

from tyro.conf import OmitArgPrefixes

from fgpt.generation.beam import LengthPenalty
from fgpt.generation.sampling import GREEDY, SamplingParams
from fgpt.ranges import BatchSize, PositiveInt, Seed


@dataclass(frozen=True)
class Writing:
    """How to write."""

    most: PositiveInt = 200
    """Most new tokens."""
    sampling: OmitArgPrefixes[SamplingParams] = GREEDY
    beams: BatchSize = 1
    """Above 1, beam search: the likeliest of the texts it finds."""
    length_penalty: LengthPenalty = 1.0
    """Of beam search: log-probabilities are divided by the length to this power."""
    samples: BatchSize = 1
    """Texts to write."""
    stop: tuple[str, ...] = ()
    """Strings that end a text, and are no part of it."""
    seed: Seed = 0
    compiled: bool = False
    """Compile the step, which takes half a minute the first time: on a CPU the text then comes twice as fast or more.
    Needs a C++ compiler."""


PLAINLY = Writing()
"""One text, the likeliest token each time."""


@dataclass(frozen=True)
class Alike:
    """How every side of a comparison is to write: by the same rule, and by the same key for the same prompt."""

    most: PositiveInt | None = None
    """Most new tokens of an answer; None takes the first run's."""
    sampling: OmitArgPrefixes[SamplingParams] = GREEDY
    seed: Seed = 0


ALIKE = Alike()
"""The likeliest token each time."""
