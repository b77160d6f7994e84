"""Rows of a batch: neighbors do not matter, nothing is computed twice."""

from typing import Any

import pytest
import torch
from builders import close, tiny, tokens
from builders.generation import WARM_SAMPLING

import fgpt
from fgpt.generation import static_cache
from fgpt.generation.sampling import SamplingParams


def test_a_row_does_not_see_its_neighbors():
    """Sampled, ragged, some ending early: whatever is beside it, and however wide the padding."""
    params, rng = tiny(), fgpt.key(3)
    prompts = [tokens(31, n, seed=n).tolist() for n in (3, 9, 5)]
    together = fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=30, sampling=WARM_SAMPLING, rng=rng)
    keys = [fgpt.fold_in(rng, i) for i in range(3)]
    parts = [
        fgpt.generate(params, prompts[i:j], eos_token_id=0, max_new_tokens=30, sampling=WARM_SAMPLING, rng=keys[i:j])
        for i, j in ((0, 1), (1, 3))
    ]
    assert [*parts[0], *parts[1]] == together
    others = [tokens(31, n, seed=50 + n).tolist() for n in (11, 1, 2)]
    for i in range(3):
        beside = [prompts[j] if j == i else others[j] for j in range(3)]
        assert (
            fgpt.generate(params, beside, eos_token_id=0, max_new_tokens=30, sampling=WARM_SAMPLING, rng=rng)[i]
            == together[i]
        )
    assert (
        fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=30, sampling=WARM_SAMPLING, rng=rng) == together
    )
    assert (
        fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=30, sampling=WARM_SAMPLING, rng=fgpt.key(4))
        != together
    )
    assert (
        len(
            {
                tuple(x.tokens)
                for x in fgpt.generate(
                    params, prompts[:1] * 6, eos_token_id=0, max_new_tokens=12, sampling=WARM_SAMPLING, rng=rng
                )
            }
        )
        > 3
    )


def test_what_is_read_and_computed(monkeypatch: pytest.MonkeyPatch):
    """A prompt that is there several times is read once, and a row at its end is computed no more."""
    params, sizes = tiny(), []
    read, step = static_cache.prefill, static_cache.decode_step

    def reads(p: fgpt.GPT, x: torch.Tensor, *rest: Any) -> Any:
        sizes.append(tuple(x.shape))
        return read(p, x, *rest)

    def steps(p: fgpt.GPT, x: torch.Tensor, *rest: Any) -> Any:
        sizes.append(tuple(x.shape))
        return step(p, x, *rest)

    monkeypatch.setattr(static_cache, "prefill", reads)
    monkeypatch.setattr(static_cache, "decode_step", steps)
    prompt = tokens(31, 4).tolist()
    got = fgpt.generate(
        params,
        [prompt] * 5,
        eos_token_id=0,
        max_new_tokens=15,
        sampling=SamplingParams(temperature=2.0),
        rng=fgpt.key(0),
    )
    assert sizes[0] == (1, 4)
    lengths = [len(x.tokens) + x.finished for x in got]
    assert len(set(lengths)) > 1
    assert [n for (n,) in sizes[1:]] == [sum(s > i for s in lengths) for i in range(1, max(lengths))]


def test_log_probabilities_are_the_models():
    params = tiny()
    prompts = [tokens(31, n, seed=n).tolist() for n in (2, 6)]
    for prompt, got in zip(
        prompts,
        fgpt.generate(
            params, prompts, eos_token_id=0, max_new_tokens=9, sampling=WARM_SAMPLING, rng=fgpt.key(1), logprobs=True
        ),
        strict=True,
    ):
        whole = torch.tensor([[*prompt, *got.tokens, *([0] if got.finished else [])]])
        log_p = (
            fgpt.apply(params, whole[:, :-1]).log_softmax(-1).gather(-1, whole[:, 1:, None])[0, len(prompt) - 1 :, 0]
        )
        close(torch.tensor(got.logprobs), log_p, 1e-5)
