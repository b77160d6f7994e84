"""What may come next, and which of it does: small pure functions of logits that compose.

A filter lowers logits, to -inf where a token may not come; `draw` takes one token a row of what is left. Nothing is
changed in place, and no row of a result depends on another row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Range
from fgpt.rng import fold_in

LogitsProcessor: TypeAlias = Callable[
    [Float[Tensor, "batch vocab"], Int[Tensor, "batch past"]], Float[Tensor, "batch vocab"]
]
"""(logits, seen) -> logits, -inf where a token may not come.

`seen` is each row's text so far, prompt included, padded on the left with -1. Logits keep their dtype; probabilities,
where a filter asks for them, are in fp32.
"""

# -------------------------------------------------------------------------------------------------------------- filters


def compose(*filters: LogitsProcessor) -> LogitsProcessor:
    """One filter after the other, from the left; of none, the logits as they are."""

    def run(logits: Float[Tensor, "batch vocab"], seen: Int[Tensor, "batch past"]) -> Float[Tensor, "batch vocab"]:
        for each in filters:
            logits = each(logits, seen)
        return logits

    return run


def temperature(t: float) -> LogitsProcessor:
    """logits / t: above 1 flatter, below 1 sharper.

    Raises InputError unless 0 < t < inf.
    """
    _expect("temperature", t, 0 < t < math.inf, "a number above 0")
    return lambda logits, seen: logits / t


def top_k(k: int) -> LogitsProcessor:
    """The k likeliest tokens, and whatever ties with the last of them; every token where there are fewer than k.

    Raises InputError unless k is a whole number, 1 or more.

    Source: Fan et al. 2018, section 5.1.
    """
    _expect("top_k", k, isinstance(k, int) and k >= 1, "a whole number of tokens, 1 or more")

    def run(logits: Float[Tensor, "batch vocab"], seen: Int[Tensor, "batch past"]) -> Float[Tensor, "batch vocab"]:
        least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
        return logits.masked_fill(logits < least, -math.inf)

    return run


def top_p(p: float) -> LogitsProcessor:
    """The nucleus: the fewest of the likeliest tokens that have probability p or more together.

    Of tokens that tie at its edge, those of higher number are in it. One token always is.

    Raises InputError unless 0 < p <= 1.

    Source: Holtzman et al. 2020, section 3.1.
    """
    _expect("top_p", p, 0 < p <= 1, "a probability above 0, at most 1")

    def run(logits: Float[Tensor, "batch vocab"], seen: Int[Tensor, "batch past"]) -> Float[Tensor, "batch vocab"]:
        scores = logits.float()
        # All tokens below this would together be within 1 - p: they are out, in any order. Sorting them is most of the
        # cost, and ties cost little.
        hopeless = scores.softmax(-1) < (1 - p) / (2 * logits.shape[-1])
        order = scores.masked_fill(hopeless, -math.inf).argsort(dim=-1, stable=True)
        out = scores.gather(-1, order).softmax(-1).cumsum(-1) <= 1 - p
        out[:, -1] = False
        return logits.masked_fill(out.scatter(-1, order, out), -math.inf)

    return run


def min_p(p: float) -> LogitsProcessor:
    """The tokens at least p times as likely as the likeliest.

    Raises InputError unless 0 < p <= 1.

    Source: Nguyen et al. 2024, section 3.
    """
    _expect("min_p", p, 0 < p <= 1, "a share of the likeliest token's probability, above 0, at most 1")

    def run(logits: Float[Tensor, "batch vocab"], seen: Int[Tensor, "batch past"]) -> Float[Tensor, "batch vocab"]:
        probs = logits.float().softmax(-1)
        return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -math.inf)

    return run


def repetition_penalty(r: float) -> LogitsProcessor:
    """For each token seen, once: logit / r where it is positive, logit * r where it is not. Above 1 it repeats less.

    Raises InputError unless 0 < r < inf.

    Source: Keskar et al. 2019 (CTRL), section 4.1.
    """
    _expect("repetition_penalty", r, 0 < r < math.inf, "a number above 0, where 1 changes nothing")

    def run(logits: Float[Tensor, "batch vocab"], seen: Int[Tensor, "batch past"]) -> Float[Tensor, "batch vocab"]:
        penalised = torch.where(logits < 0, logits * r, logits / r)
        return torch.where(_among(seen, logits.shape[-1]), penalised, logits)

    return run


def no_repeat_ngram(n: int) -> LogitsProcessor:
    """No token that would complete n tokens which the row has seen in a row before. It may leave none at all.

    Raises InputError unless n is a whole number, 1 or more.

    Source: Paulus et al. 2018, section 2.5.
    """
    _expect("no_repeat_ngram", n, isinstance(n, int) and n >= 1, "a whole number of tokens, 1 or more")

    def run(logits: Float[Tensor, "batch vocab"], seen: Int[Tensor, "batch past"]) -> Float[Tensor, "batch vocab"]:
        if seen.shape[1] < n:
            return logits
        end, windows = seen[:, seen.shape[1] - (n - 1) :], seen.unfold(1, n, 1)  # [batch n-1], [batch windows n]
        # A shorter text leaves padding in its end; all that can follow such a match is padding, which is no token.
        again = (windows[..., :-1] == end[:, None]).all(-1)
        return logits.masked_fill(_among(windows[..., -1].where(again, -1), logits.shape[-1]), -math.inf)

    return run


def _among(ids: Int[Tensor, "batch some"], vocab: int) -> Bool[Tensor, "batch vocab"]:
    """Which tokens are among `ids`; -1 is none, nor is one past the vocabulary, as an embedding can have."""
    spare = ids.new_zeros(len(ids), vocab + 1, dtype=torch.bool)  # its last column stands for none
    return spare.scatter(1, ids.where(ids >= 0, vocab).clamp(max=vocab).long(), True)[:, :vocab]


def _expect(name: str, value: int | float, good: bool, expected: str) -> None:
    if not good:
        raise InputError(f"{name} is {value}: expected {expected}")


# ------------------------------------------------------------------------------------------------------------- sampling


_Choice: TypeAlias = tuple[Callable[[Any], LogitsProcessor], Any]  # what makes a filter, and of what value


def _made(choices: list[_Choice]) -> list[LogitsProcessor]:
    return [make(value) for make, value in choices if value is not None]


Share: TypeAlias = Annotated[float, Range(above=0, most=1)]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen: the likeliest at temperature 0, else one drawn from what the filters leave.

    None is no such filter. Raises InputError for a value that its filter refuses, at any temperature.
    """

    temperature: NonNegativeFloat = 0.0
    top_k: PositiveInt | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: PositiveFloat | None = None
    no_repeat_ngram: PositiveInt | None = None

    def __post_init__(self) -> None:
        _expect("temperature", self.temperature, 0 <= self.temperature < math.inf, "a number above 0, or 0 for greedy")
        _made(self._penalties() + self._warpers()[self.temperature == 0 :])

    @property
    def filter(self) -> LogitsProcessor:
        """Repetition penalty, n-grams, and where a token is drawn temperature, top-k, top-p, min-p, in this order."""
        return compose(*_made(self._penalties() + (self._warpers() if self.temperature > 0 else [])))

    def _penalties(self) -> list[_Choice]:
        return [(repetition_penalty, self.repetition_penalty), (no_repeat_ngram, self.no_repeat_ngram)]

    def _warpers(self) -> list[_Choice]:
        return [(temperature, self.temperature), (top_k, self.top_k), (top_p, self.top_p), (min_p, self.min_p)]


GREEDY = SamplingParams()

# -------------------------------------------------------------------------------------------------------------- drawing


def sample(logits: Float[Tensor, "batch vocab"], rngs: Sequence[torch.Generator] | None) -> Int[Tensor, " batch"]:
    """One token a row: drawn from softmax(logits) by the row's own key, or the likeliest where there are no keys.

        token = the first with  p_1 + .. + p_token > u (p_1 + .. + p_vocab),   u = uniform(key)

    A function of the row's logits and key alone, the same on every device; a key is never advanced, so each step
    wants a new one: `fold_in(key, step)`. A token at -inf never comes. Sums are in fp64, u has 53 bits: no token's
    chance is off by more than the rounding of an fp32 softmax.

    Raises InputError for a row with no token that may come, for NaN, and unless there is one key a row.

    Source: Devroye 1986, section III.2.1 (inversion by sequential search; here the search is binary).
    """
    best, likeliest = logits.max(-1)
    if not best.isfinite().all():
        row = int((~best.isfinite()).nonzero()[0])
        raise InputError(
            f"row {row} has a largest logit of {best[row].item()}: expected a finite number. At -inf no token may come "
            "(a larger no_repeat_ngram forbids less), else the model diverged or the temperature is too near 0"
        )
    if rngs is None:
        return likeliest
    if len(rngs) != len(logits):
        raise InputError(f"{len(rngs)} keys for {len(logits)} rows: expected one key a row, such as fold_in(key, row)")
    sums = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    u = torch.tensor([uniform(rng) for rng in rngs], dtype=torch.float64, device=logits.device)
    return torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)[:, 0]


def uniform(rng: torch.Generator) -> float:
    """A number in [0, 1), of 53 bits: the key's hash itself, so that no generator need be run."""
    return (fold_in(rng, "uniform").initial_seed() >> 10) * 2.0**-53
