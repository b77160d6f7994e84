"""Choosing the next token: logits processors, small pure functions that compose, and sampling.

A logits processor changes logits, to -inf for a token that may not come next; `sample` then chooses one token for each
row. Nothing is changed in place, and no row of a result depends on another row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Range
from fgpt.rng import fold_in

Logits: TypeAlias = Float[Tensor, "batch vocab"]
PastTokens: TypeAlias = Int[Tensor, "batch past"]
LogitsProcessor: TypeAlias = Callable[[Logits, PastTokens], Logits]
"""(logits, past_tokens) -> logits, -inf for a token that may not come next.

`past_tokens` is each row's text so far, prompt included, padded on the left with -1. Logits keep their dtype;
probabilities are computed in fp32.
"""

# ---------------------------------------------------------------------------------------------------- logits processors


def compose(*processors: LogitsProcessor) -> LogitsProcessor:
    """One processor after the other, from the left; without any, the identity."""

    def process(logits: Logits, past_tokens: PastTokens) -> Logits:
        for processor in processors:
            logits = processor(logits, past_tokens)
        return logits

    return process


def temperature(t: float) -> LogitsProcessor:
    """logits / t: above 1 flatter, below 1 sharper.

    Raises InputError unless 0 < t < inf.
    """
    _expect("temperature", t, 0 < t < math.inf, "a number above 0")
    return lambda logits, past_tokens: logits / t


def top_k(k: int) -> LogitsProcessor:
    """The k likeliest tokens, and those that tie with the last of them; every token if there are fewer than k.

    Raises InputError unless k is an integer, 1 or more.

    Source: Fan et al. 2018, section 5.1.
    """
    _expect("top_k", k, isinstance(k, int) and k >= 1, "a number of tokens, 1 or more")

    def process(logits: Logits, past_tokens: PastTokens) -> Logits:
        threshold = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
        return logits.masked_fill(logits < threshold, -math.inf)

    return process


def top_p(p: float) -> LogitsProcessor:
    """The nucleus: the smallest set of likeliest tokens whose probabilities sum to p or more.

    Of tokens that tie at its edge, those with higher ids are in it. At least one token is.

    Raises InputError unless 0 < p <= 1.

    Source: Holtzman et al. 2020, section 3.1.
    """
    _expect("top_p", p, 0 < p <= 1, "a probability above 0, at most 1")

    def process(logits: Logits, past_tokens: PastTokens) -> Logits:
        scores = logits.float()
        # All tokens below this sum to less than 1 - p: they are out in any order. Sorting them would be most of the
        # cost; as ties they cost little.
        negligible = scores.softmax(-1) < (1 - p) / (2 * logits.shape[-1])
        order = scores.masked_fill(negligible, -math.inf).argsort(dim=-1, stable=True)
        removed = scores.gather(-1, order).softmax(-1).cumsum(-1) <= 1 - p
        removed[:, -1] = False
        return logits.masked_fill(removed.scatter(-1, order, removed), -math.inf)

    return process


def min_p(p: float) -> LogitsProcessor:
    """The tokens at least p times as likely as the likeliest.

    Raises InputError unless 0 < p <= 1.

    Source: Nguyen et al. 2024, section 3.
    """
    _expect("min_p", p, 0 < p <= 1, "a part of the likeliest token's probability, above 0, at most 1")

    def process(logits: Logits, past_tokens: PastTokens) -> Logits:
        probs = logits.float().softmax(-1)
        return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -math.inf)

    return process


def repetition_penalty(r: float) -> LogitsProcessor:
    """logit / r of each past token if the logit is positive, logit * r if it is not. Above 1 the text repeats less.

    Raises InputError unless 0 < r < inf.

    Source: Keskar et al. 2019 (CTRL), section 4.1.
    """
    _expect("repetition_penalty", r, 0 < r < math.inf, "a number above 0 (1 changes nothing)")

    def process(logits: Logits, past_tokens: PastTokens) -> Logits:
        penalized = torch.where(logits < 0, logits * r, logits / r)
        return torch.where(_occurs(past_tokens, logits.shape[-1]), penalized, logits)

    return process


def no_repeat_ngram(n: int) -> LogitsProcessor:
    """No token that would complete an n-gram of the row's text so far. This may forbid every token.

    Raises InputError unless n is an integer, 1 or more.

    Source: Paulus et al. 2018, section 2.5.
    """
    _expect("no_repeat_ngram", n, isinstance(n, int) and n >= 1, "a number of tokens, 1 or more")

    def process(logits: Logits, past_tokens: PastTokens) -> Logits:
        length = past_tokens.shape[1]
        if length < n:
            return logits
        ngrams: Int[Tensor, "batch ngram n"] = past_tokens.unfold(1, n, 1)
        end: Int[Tensor, "batch n-1"] = past_tokens[:, length - (n - 1) :]
        # A text shorter than n - 1 has padding in its end; only padding can follow such a match, which is no token.
        matches = (ngrams[..., :-1] == end[:, None]).all(-1)
        forbidden = ngrams[..., -1].where(matches, -1)
        return logits.masked_fill(_occurs(forbidden, logits.shape[-1]), -math.inf)

    return process


def _occurs(ids: Int[Tensor, "batch count"], vocab_size: int) -> Bool[Tensor, "batch vocab"]:
    """Which tokens occur in `ids`. -1 is no token, nor is an id past the vocabulary, as an embedding can have."""
    column = ids.where(ids >= 0, vocab_size).clamp(max=vocab_size).long()  # an extra last column for those
    return ids.new_zeros(len(ids), vocab_size + 1, dtype=torch.bool).scatter(1, column, True)[:, :vocab_size]


def _expect(name: str, value: int | float, valid: bool, expected: str) -> None:
    if not valid:
        raise InputError(f"{name} is {value}: expected {expected}")


# ------------------------------------------------------------------------------------------------------------- sampling


Probability: TypeAlias = Annotated[float, Range(above=0, most=1)]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen: the likeliest at temperature 0, else a sample from what the processors leave.

    Args:
        temperature: 0 for greedy decoding, else the divisor of the logits.
        top_k, top_p, min_p: See the functions of these names; they apply at a temperature above 0.
        repetition_penalty, no_repeat_ngram: See the functions of these names; they apply at any temperature.

    None is no such processor.

    Raises:
        InputError: for a value that its processor refuses, at any temperature.

    >>> import fgpt
    >>> fgpt.SamplingParams(temperature=0.8, top_k=50).top_k
    50
    """

    temperature: NonNegativeFloat = 0.0
    top_k: PositiveInt | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    repetition_penalty: PositiveFloat | None = None
    no_repeat_ngram: PositiveInt | None = None

    def __post_init__(self) -> None:
        _expect("temperature", self.temperature, 0 <= self.temperature < math.inf, "a number above 0, or 0 for greedy")
        self._penalties()
        self._warpers()

    @property
    def logits_processor(self) -> LogitsProcessor:
        """Repetition penalty and n-grams, then, unless greedy, temperature, top-k, top-p and min-p, in this order."""
        if self.temperature == 0:
            return compose(*self._penalties())
        return compose(*self._penalties(), temperature(self.temperature), *self._warpers())

    def _penalties(self) -> list[LogitsProcessor]:
        processors: list[LogitsProcessor] = []
        if self.repetition_penalty is not None:
            processors.append(repetition_penalty(self.repetition_penalty))
        if self.no_repeat_ngram is not None:
            processors.append(no_repeat_ngram(self.no_repeat_ngram))
        return processors

    def _warpers(self) -> list[LogitsProcessor]:
        processors: list[LogitsProcessor] = []
        if self.top_k is not None:
            processors.append(top_k(self.top_k))
        if self.top_p is not None:
            processors.append(top_p(self.top_p))
        if self.min_p is not None:
            processors.append(min_p(self.min_p))
        return processors


GREEDY = SamplingParams()


def sample(logits: Logits, keys: Sequence[torch.Generator] | None) -> Int[Tensor, " batch"]:
    """One token for each row: sampled from softmax(logits) with the row's key, or the likeliest if there are no keys.

        token = the first with  p_1 + .. + p_token > u (p_1 + .. + p_vocab),   u = uniform(key)

    A function of the row's logits and key alone. u is the same on every device, and so is the token, to rounding: each
    device adds up the softmax in its own order, so that a u at the border of two tokens may fall on either. A key is
    never advanced, so each step needs a new one: `fold_in(key, step)`. A token at -inf is never chosen. Sums are in
    fp64 and u has 53 bits: no token's probability is off by more than the rounding of an fp32 softmax.

    Raises InputError for a row without a token that may come next, for NaN, and unless there is one key for each row.

    Source: Devroye 1986, section III.2.1 (inversion by sequential search; here the search is binary).
    """
    best, likeliest = logits.max(-1)
    if not best.isfinite().all():
        row = int((~best.isfinite()).nonzero()[0])
        raise InputError(
            f"row {row} has a largest logit of {best[row].item()}: expected a finite number. At -inf every token is "
            "forbidden (a larger no_repeat_ngram forbids fewer), else the model diverged or the temperature is too "
            "near 0"
        )
    if keys is None:
        return likeliest
    if len(keys) != len(logits):
        raise InputError(f"{len(keys)} keys for {len(logits)} rows: expected one for each row, as fold_in(key, row)")
    sums = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    u = torch.tensor([uniform(key) for key in keys], dtype=torch.float64, device=logits.device)
    return torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)[:, 0]


def uniform(key: torch.Generator) -> float:
    """A number in [0, 1) with 53 bits, from the key's hash itself: no generator needs to run."""
    return (fold_in(key, "uniform").initial_seed() >> 10) * 2.0**-53
