"""Text as it is written: whole characters, and an end before a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fgpt
from fgpt.generation.loop import stop_on_strings, stream, stream_text, truncate_at_stop
from fgpt.generation.sampling import SamplingParams
from fgpt.io import models

NANO = models.tokenizer("nano")


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_pieces_are_whole_characters_and_stop_before_the_stop(text: str, strings: list[str]):
    """Cut into single bytes, the worst that a tokenizer can do."""
    codes = list(text.encode())

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    got = list(stream_text(decode, codes, strings))
    assert "".join(got) == truncate_at_stop(text, strings)
    assert all(got)
    if "�" not in text:
        assert "�" not in "".join(got)
    if not strings and text and "�" not in text:
        assert len(got) == len(text)  # each as soon as it is whole


@pytest.mark.slow
@settings(max_examples=5)
@given(st.integers(0, 99))
def test_stop_strings(seed: int):
    params = fgpt.load("nano")
    prompt = NANO.encode("Once upon a time")
    rng, sampling, eos = fgpt.key(seed), SamplingParams(temperature=1.0), NANO.eos_token_id
    free = fgpt.generate(params, [prompt], eos_token_id=eos, max_new_tokens=60, sampling=sampling, rng=rng)[0]
    whole = NANO.decode(free.tokens)
    strings = [whole[20:23], "never this"]
    until = stop_on_strings(NANO.decode, strings)
    got = fgpt.generate(
        params, [prompt], eos_token_id=eos, max_new_tokens=60, sampling=sampling, rng=rng, stopping_criterion=until
    )[0]
    assert truncate_at_stop(NANO.decode(got.tokens), strings) == truncate_at_stop(whole, strings)
    assert got.tokens == free.tokens[: len(got.tokens)]
    assert strings[0] not in NANO.decode(got.tokens[:-1])
    steps = stream(
        params, [prompt], eos_token_id=eos, max_new_tokens=60, sampling=sampling, rng=rng, stopping_criterion=until
    )
    assert "".join(
        stream_text(NANO.decode, (x.token for s in steps for x in s if not x.is_eos), strings)
    ) == truncate_at_stop(whole, strings)
    with pytest.raises(fgpt.InputError, match="a stop string is empty"):
        stop_on_strings(NANO.decode, ["a", ""])
