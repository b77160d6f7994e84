"""What may come next is what transformers' processors leave."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders.sampling import FILTERS, SamplingCase, padded_texts, sampling_cases
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

import fgpt
from fgpt.generation import sampling as S


def agrees(ours: S.LogitsProcessor, reference: Callable[[Any, Any], Any], case: SamplingCase) -> None:
    """Bitwise, the batch with each of its rows alone; and the inputs are as they were."""
    logits, texts = case.logits.clone(), case.padded_texts
    out = ours(logits, texts)
    assert torch.equal(logits, case.logits)
    assert torch.equal(texts, case.padded_texts)
    alone = [
        reference(torch.tensor([text], dtype=torch.long), row[None].clone())
        for text, row in zip(case.texts, case.logits, strict=True)
    ]
    assert torch.equal(out, torch.cat(alone))


@pytest.mark.parametrize("name", FILTERS)
@given(sampling_cases(), st.data())
def test_a_filter_is_transformers(name: str, case: SamplingCase, data: st.DataObject):
    ours, reference, values = FILTERS[name]
    value = data.draw(values)
    agrees(ours(value), reference(value), case)


@given(sampling_cases(), st.data())
def test_the_chain_is_transformers(case: SamplingCase, data: st.DataObject):
    """With any of the filters, at temperature 0 and above; order matters, and so it is theirs."""
    names = ("repetition_penalty", "no_repeat_ngram", "temperature", "top_k", "top_p", "min_p")
    values: dict[str, Any] = {name: data.draw(st.none() | FILTERS[name][2]) for name in names}
    values["temperature"] = values["temperature"] or 0.0
    used = {name: v for name, v in values.items() if v and (values["temperature"] or name in names[:2])}
    reference = hf.LogitsProcessorList([FILTERS[name][1](v) for name, v in used.items()])

    agrees(S.SamplingParams(**values).logits_processor, reference, case)


@pytest.mark.parametrize("p", [0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("step", [0, 0.25], ids=["distinct", "tied"])
def test_top_p_of_a_large_vocabulary(p: float, step: float):
    """Where most tokens are hopeless. Of tied tokens transformers keeps as many, if not the same."""
    logits = torch.randn(4, 5000, generator=fgpt.key(0)) * torch.tensor([[0.5], [1.0], [3.0], [6.0]])
    logits = (logits / step).round() * step if step else logits
    nothing: Any = padded_texts([[]] * 4)
    out, reference = S.top_p(p)(logits, nothing), hf.TopPLogitsWarper(p)(nothing, logits)
    assert torch.equal(out.sort(-1).values, reference.sort(-1).values)
    assert step or torch.equal(out, reference)


def test_of_tied_tokens_the_higher_numbers_are_in_the_nucleus():
    out = S.top_p(0.5)(torch.zeros(1, 400), padded_texts([[]]))
    assert out[0].isfinite().tolist() == [False] * 200 + [True] * 200


def test_a_nucleus_smaller_than_rounding_is_one_token():
    assert S.top_p(1e-9)(torch.tensor([[0.0, 3.0, 3.0]]), padded_texts([[]])).isfinite().tolist() == [
        [False, False, True]
    ]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_text_as_long_as_the_ngram_can_repeat_it(n: int):
    out = S.no_repeat_ngram(n)(torch.zeros(2, 3), padded_texts([[1] * n, [1] * (n - 1)]))
    assert out.isfinite().tolist() == [[True, False, True], [True] * 3]


def test_bf16_stays_and_probabilities_are_fp32():
    logits, texts = torch.randn(3, 12, generator=fgpt.key(1)).bfloat16(), padded_texts([[1, 2, 1], [3], []])
    for name, value in {"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.3, "no_repeat_ngram": 2}.items():
        ours, reference, _ = FILTERS[name]
        out = ours(value)(logits, texts)
        assert out.dtype == torch.bfloat16
        row = reference(value)(torch.tensor([[1, 2, 1]]), logits[:1])
        assert torch.equal(out[:1], row)
    many = torch.randn(3, 1000, generator=fgpt.key(2)).bfloat16()  # sums in bf16 would be off by whole tokens
    assert torch.equal(S.top_p(0.5)(many, texts).float(), S.top_p(0.5)(many.float(), texts))
    near = torch.tensor([[0.0, -0.001]], dtype=torch.bfloat16)  # 0.999 as likely, in bf16 just as likely
    assert S.min_p(1.0)(near, texts[:1]).isfinite().tolist() == [[True, False]]
    assert S.min_p(0.5)(near, texts[:1]).dtype == S.top_p(0.5)(near, texts[:1]).dtype == torch.bfloat16


def test_a_chain_of_none_is_the_identity_and_order_is_from_the_left():
    logits, texts = torch.tensor([[1.0, 2.0, 3.0]]), padded_texts([[2]])
    assert torch.equal(S.compose()(logits, texts), logits)
    only, halved = S.top_k(1), S.repetition_penalty(3.0)
    assert S.compose(only, halved)(logits, texts).tolist() == [[-math.inf, -math.inf, 1.0]]
    assert S.compose(halved, only)(logits, texts).tolist() == [[-math.inf, 2.0, -math.inf]]


def test_the_order_of_the_filters():
    """Each case leaves something else in any other order."""
    logits, texts = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log(), padded_texts([[1]])
    for sampling, allowed in (
        (S.SamplingParams(1.0, top_k=2, top_p=0.5), [0]),  # 0.4 / 0.7 is above a half, 0.4 is not
        (S.SamplingParams(1.0, top_p=0.5, min_p=0.6), [0, 1]),  # of these two alone, one would be the nucleus
        (S.SamplingParams(0.5, top_p=0.5), [0]),  # squared, it has 16 parts of 30
        (S.SamplingParams(1.0, top_k=2, repetition_penalty=2.0), [0, 2]),
        (S.SamplingParams(1.0, top_k=2, no_repeat_ngram=1), [0, 2]),
    ):
        assert sampling.logits_processor(logits, texts)[0].isfinite().nonzero()[:, 0].tolist() == allowed
