"""Greedy texts and beams are transformers' token by token."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from builders import close, hf_gpt2, load_hf_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import fgpt
from fgpt.generation.beam import beam_search
from fgpt.generation.sampling import SamplingParams


def both(seed: int) -> tuple[Any, fgpt.GPT]:
    with TemporaryDirectory() as folder:
        model = hf_gpt2(seed)
        return model, load_hf_model(model, Path(folder))


def hf_generate(model: Any, prompt: list[int], most: int, **options: Any) -> Any:
    ids = torch.tensor([prompt])
    options = {
        "attention_mask": torch.ones_like(ids),
        "eos_token_id": 0,
        "pad_token_id": 0,
        "do_sample": False,
    } | options
    return model.generate(ids, max_new_tokens=most, return_dict_in_generate=True, **options)


def text(row: torch.Tensor, start: int) -> tuple[list[int], bool]:
    generated = row[start:].tolist()
    return (generated[: generated.index(0)], True) if 0 in generated else (generated, False)


@pytest.mark.slow
@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.sampled_from([None, 0.7, 1.3, 2.0]),
    st.sampled_from([None, 1, 2, 3]),
    st.integers(0, 99),
)
def test_penalised_greedy_text_is_transformers(lengths: list[int], penalty: Any, ngram: Any, seed: int):
    """A ragged batch, each row against transformers on it alone."""
    model, params = both(seed)
    prompts = [tokens(31, n, seed=seed + i).tolist() for i, n in enumerate(lengths)]
    sampling = SamplingParams(repetition_penalty=penalty, no_repeat_ngram=ngram)
    for prompt, got in zip(
        prompts, fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=11, sampling=sampling), strict=True
    ):
        options = {"repetition_penalty": penalty or 1.0, "no_repeat_ngram_size": ngram or 0}
        expected = text(hf_generate(model, prompt, 11, **options).sequences[0], len(prompt))
        assert (got.tokens, got.finished) == expected


@pytest.mark.slow
@settings(max_examples=25)
@given(
    st.integers(1, 12),
    st.integers(2, 5),
    st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_beams_are_transformers(length: int, beams: int, penalty: float, penalised: bool, seed: int):
    """Texts and scores, all of them, in their order."""
    model, params = both(seed)
    prompt = tokens(31, length, seed=seed).tolist()
    extra: dict[str, Any] = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2} if penalised else {}
    sampling = SamplingParams(repetition_penalty=1.5, no_repeat_ngram=2) if penalised else SamplingParams()
    found = beam_search(
        params, prompt, eos_token_id=0, max_new_tokens=10, num_beams=beams, length_penalty=penalty, sampling=sampling
    )
    expected = hf_generate(
        model,
        prompt,
        10,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=penalty,
        output_scores=True,
        **extra,
    )
    assert [(x.tokens, x.finished) for x in found] == [text(row, length) for row in expected.sequences]
    close(torch.tensor([x.score for x in found]), expected.sequences_scores, 1e-4)
