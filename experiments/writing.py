"""How a trained run is to write: the options of `just generate` and `just chat`."""

from dataclasses import dataclass

from tyro.conf import OmitArgPrefixes

from fgpt.sampling import GREEDY, Sampling


@dataclass(frozen=True)
class Writing:
    """How to write."""

    most: int = 200
    """Most new tokens."""
    sampling: OmitArgPrefixes[Sampling] = GREEDY
    beams: int = 1
    """Above 1, beam search: the likeliest of the texts it finds."""
    length_penalty: float = 1.0
    """Of beam search: log-probabilities are divided by the length to this power."""
    samples: int = 1
    """Texts to write."""
    stop: tuple[str, ...] = ()
    """Strings that end a text, and are no part of it."""
    seed: int = 0


PLAINLY = Writing()
"""One text, the likeliest token each time."""
