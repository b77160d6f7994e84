"""Beams of several prompts at once are those of each prompt alone, and transformers' token by token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import close, hf_gpt2, load_hf_model, tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor

import fgpt
from fgpt.generation.beam import beam_search, beam_search_batch
from fgpt.generation.sampling import SamplingParams


class NoRepeatedNGramOfNewTokens(LogitsProcessor):
    """transformers' own processor, which is shown no prompt."""

    def __init__(self, n: int, prompt_length: int) -> None:
        self.processor, self.prompt_length = NoRepeatNGramLogitsProcessor(n), prompt_length

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self.processor(input_ids[:, self.prompt_length :], scores)


def transformers_beams(model: Any, prompt: Sequence[int], **options: Any) -> tuple[list[list[int]], torch.Tensor]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        eos_token_id=0,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    rows = [row[len(prompt) :].tolist() for row in output.sequences]
    return [row[: row.index(0)] if 0 in row else row for row in rows], output.sequences_scores


@pytest.mark.parametrize("prompt_counts", [True, False])
@pytest.mark.parametrize("length_penalty", [0.8, -1.0, 2.0])
def test_a_ragged_batch_has_transformers_texts(prompt_counts: bool, length_penalty: float, tmp_path: Path):
    model = hf_gpt2(3)
    params = load_hf_model(model, tmp_path)
    prompts = [tokens(31, n, seed=n).tolist() for n in (9, 2, 5, 2)]
    several = beam_search_batch(
        params,
        prompts,
        eos_token_id=0,
        max_new_tokens=10,
        num_beams=4,
        length_penalty=length_penalty,
        sampling=SamplingParams(no_repeat_ngram=2),
        prompt_counts=prompt_counts,
    )
    for prompt, hypotheses in zip(prompts, several, strict=True):
        processor = NoRepeatedNGramOfNewTokens(2, 0 if prompt_counts else len(prompt))
        texts, scores = transformers_beams(
            model,
            prompt,
            max_new_tokens=10,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=length_penalty,
            logits_processor=LogitsProcessorList([processor]),
        )
        assert [hypothesis.tokens for hypothesis in hypotheses] == texts
        close(torch.tensor([hypothesis.score for hypothesis in hypotheses]), scores, 1e-4)


@pytest.mark.slow
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    num_beams=st.integers(1, 5),
    length_penalty=st.sampled_from([0.8, 0.0, -2.0, 3.0]),
    max_new_tokens=st.integers(1, 12),
    eos=st.sampled_from([-1, 0, (0, 7, 9)]),
    seed=st.integers(0, 99),
)
def test_no_prompt_changes_the_texts_of_another(
    lengths: list[int], num_beams: int, length_penalty: float, max_new_tokens: int, eos: Any, seed: int
):
    """Prompts up to the context's last token among them, each with as many new tokens as fit after it."""
    params = tiny()
    prompts = [tokens(31, n, seed=seed + n).tolist() for n in lengths]
    options: dict[str, Any] = {
        "eos_token_id": eos,
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
    }
    for prompt, hypotheses in zip(prompts, beam_search_batch(params, prompts, **options), strict=True):
        alone = beam_search(params, prompt, **options)
        assert [x.tokens for x in hypotheses] == [x.tokens for x in alone]
        assert [x.finished for x in hypotheses] == [x.finished for x in alone]
        close(torch.tensor([x.score for x in hypotheses]), torch.tensor([x.score for x in alone]), 1e-5, rtol=1e-6)
        assert all(len(x.tokens) <= min(max_new_tokens, 24 - len(prompt)) for x in hypotheses)


def test_a_quantized_base_searches_as_its_dense_matrices():
    frozen = fgpt.quantize(tiny(d_model=64, d_mlp=128), "nf4")
    prompts = [tokens(31, n, seed=n).tolist() for n in (4, 7)]
    options: dict[str, Any] = {"eos_token_id": 0, "max_new_tokens": 6, "num_beams": 3}
    dense = beam_search_batch(fgpt.merge(frozen, "dequantized"), prompts, **options)
    quantized = beam_search_batch(frozen, prompts, **options)
    assert [[x.tokens for x in each] for each in quantized] == [[x.tokens for x in each] for each in dense]


def test_no_prompts_have_no_texts():
    assert beam_search_batch(tiny(), [], eos_token_id=0, max_new_tokens=3) == []
    with pytest.raises(fgpt.InputError, match="prompt 1 has 24 tokens: expected 1 to 23"):
        beam_search_batch(tiny(), [[1], [1] * 24], eos_token_id=0, max_new_tokens=3)
