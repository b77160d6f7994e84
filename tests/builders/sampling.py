"""Texts of several lengths and logits for what comes next."""

import math
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

import fgpt
from fgpt.generation import sampling as S
from fgpt.rng import fold_in


class SamplingCase(NamedTuple):
    """A batch, and its texts without padding."""

    logits: Tensor
    texts: list[list[int]]

    @property
    def padded_texts(self) -> Tensor:
        return padded_texts(self.texts)


def padded_texts(texts: list[list[int]]) -> Tensor:
    width = max(map(len, texts))
    return torch.tensor([[-1] * (width - len(text)) + text for text in texts], dtype=torch.long)


@st.composite
def sampling_cases(draw: Any) -> SamplingCase:
    """Ragged texts, some empty, some with a token past the vocabulary; logits with ties and -inf, never -inf alone.

    At most 16 tokens: of more, transformers' sort leaves open which of several tied tokens comes first.
    """
    rows, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    texts = draw(st.lists(st.lists(st.integers(0, vocab), max_size=12), min_size=rows, max_size=rows))
    few = st.sampled_from([-math.inf, -2.0, -0.5, 0.0, 0.5, 1.0, 4.0])
    number = few | st.floats(-20, 20, width=32)
    logits = torch.tensor(
        draw(st.lists(st.lists(number, min_size=vocab, max_size=vocab), min_size=rows, max_size=rows))
    )
    finite = draw(st.lists(st.integers(0, vocab - 1), min_size=rows, max_size=rows))
    logits[range(rows), finite] = logits[range(rows), finite].clamp(min=-20)
    return SamplingCase(logits, texts)


SHARES = st.sampled_from([1e-6, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]) | st.floats(0.001, 1)
FACTORS = st.sampled_from([0.5, 1.0, 2.0]) | st.floats(0.1, 10)
FILTERS = {
    "temperature": (S.temperature, hf.TemperatureLogitsWarper, FACTORS),
    "top_k": (S.top_k, hf.TopKLogitsWarper, st.integers(1, 20)),
    "top_p": (S.top_p, hf.TopPLogitsWarper, SHARES),
    "min_p": (S.min_p, hf.MinPLogitsWarper, SHARES),
    "repetition_penalty": (S.repetition_penalty, hf.RepetitionPenaltyLogitsProcessor, FACTORS),
    "no_repeat_ngram": (S.no_repeat_ngram, hf.NoRepeatNGramLogitsProcessor, st.integers(1, 5)),
}


def keys_of_rows(n: int, seed: int = 0) -> list[torch.Generator]:
    return [fold_in(fgpt.key(seed), i) for i in range(n)]
