"""Bad input to generation is named."""

import pytest
from builders import tiny

import fgpt
from fgpt.generation.beam import beam_search
from fgpt.generation.prompt_lookup import prompt_lookup_decode
from fgpt.generation.sampling import SamplingParams


def test_bad_input_is_named():
    params = tiny()
    for call in (
        lambda p: fgpt.generate(params, [p], eos_token_id=0, max_new_tokens=1),
        lambda p: beam_search(params, p, eos_token_id=0, max_new_tokens=1),
        lambda p: prompt_lookup_decode(params, p, eos_token_id=0, max_new_tokens=1),
    ):
        for prompt in ([], [1] * 24):
            with pytest.raises(fgpt.InputError, match=f"prompt 0 has {len(prompt)} tokens: expected 1 to 23"):
                call(prompt)
        assert call([1]) is not None
    assert fgpt.generate(params, [], eos_token_id=0, max_new_tokens=3) == []
    for got in (
        fgpt.generate(params, [[1]], eos_token_id=0, max_new_tokens=0)[0],
        prompt_lookup_decode(params, [1], eos_token_id=0, max_new_tokens=0),
        beam_search(params, [1], eos_token_id=0, max_new_tokens=0)[0],
    ):
        assert (got.tokens, got.finished) == ([], False)
    with pytest.raises(fgpt.InputError, match="max_new_tokens is -1: expected 0 or more"):
        fgpt.generate(params, [[1]], eos_token_id=0, max_new_tokens=-1)
    with pytest.raises(fgpt.InputError, match="eos_token_id is 31: expected 0 to 30, or -1 for none"):
        fgpt.generate(params, [[1]], eos_token_id=31, max_new_tokens=1)
    with pytest.raises(fgpt.InputError, match="needs a key"):
        fgpt.generate(params, [[1]], eos_token_id=0, max_new_tokens=1, sampling=SamplingParams(temperature=1.0))
    with pytest.raises(fgpt.InputError, match="2 keys for 1 prompts: expected one for each"):
        fgpt.generate(params, [[1]], eos_token_id=0, max_new_tokens=1, rng=[fgpt.key(0), fgpt.key(1)])
    with pytest.raises(fgpt.InputError, match="expects 1 beam or more and temperature 0, got 0"):
        beam_search(params, [1], eos_token_id=0, max_new_tokens=1, num_beams=0)
    for penalty in (1e300, -1e300, float("nan")):
        with pytest.raises(fgpt.InputError, match=r"length_penalty is .*: expected -30 or more, at most 30"):
            beam_search(params, [1], eos_token_id=0, max_new_tokens=1, length_penalty=penalty)
    with pytest.raises(fgpt.InputError, match="temperature 0"):
        beam_search(params, [1], eos_token_id=0, max_new_tokens=1, sampling=SamplingParams(temperature=0.5))
