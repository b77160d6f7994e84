"""Prompt lookup writes what greedy decoding writes, in fewer passes."""

from typing import Any

import pytest
from builders import tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import fgpt
from fgpt.generation.prompt_lookup import prompt_lookup_decode, propose_ngram


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 6), st.integers(0, 99))
def test_lookup_writes_what_greedy_writes(length: int, ngram: int, ahead: int, seed: int):
    params = tiny(n_ctx=64)
    prompt = tokens(5, length, seed=seed).tolist()
    for most in (1, 7, 100):
        [expected] = fgpt.generate(params, [prompt], eos_token_id=0, max_new_tokens=most)
        assert (
            prompt_lookup_decode(
                params, prompt, eos_token_id=0, max_new_tokens=most, ngram=ngram, num_draft_tokens=ahead
            )
            == expected
        )


@pytest.mark.slow
def test_lookup_takes_fewer_passes_where_text_repeats(monkeypatch: pytest.MonkeyPatch):
    params, passes = tiny(n_ctx=200), 0

    def count_and_call(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        return fgpt.forward_with_cache(*args)

    monkeypatch.setattr("fgpt.generation.prompt_lookup.forward_with_cache", count_and_call)
    got = prompt_lookup_decode(params, [1, 2], eos_token_id=-1, max_new_tokens=150)
    assert got == fgpt.generate(params, [[1, 2]], eos_token_id=-1, max_new_tokens=150)[0]
    assert passes < 0.6 * len(got.tokens)


def test_a_draft_is_what_followed_last():
    assert propose_ngram([1, 2, 3, 9, 1, 2, 3, 7, 1, 2, 3], 3, 2) == [7, 1]
    assert propose_ngram([1, 2, 3], 3, 2) == []
    assert propose_ngram([1, 1, 1, 1], 2, 5) == [1]
