"""NEFTune: the noise is that of the paper, on the embeddings alone, and a function of its seed."""

import math
from dataclasses import replace

import pytest
import torch
from builders import close, tiny, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.kernels.dropout import random_bits, uniform_noise
from fgpt.rng import fold_in_seed
from fgpt.tree import leaves, tree_map

ALPHA = 5.0
TEXT = tokens(31, 2, 9)
TIED = tiny(tie_word_embeddings=True)


def test_the_noise_is_uniform_and_white():
    n = 512
    noise = uniform_noise(torch.tensor(3), n, n)
    assert noise.abs().max() <= 1
    assert abs(float(noise.mean())) < 5 / (3**0.5 * n)
    for moment, expected in ((2, 1 / 3), (4, 1 / 5)):
        assert float(noise.pow(moment).mean()) == pytest.approx(expected, abs=0.005)
    assert torch.linalg.matrix_norm(3**0.5 * noise, 2) < 2.15 * n**0.5
    assert torch.equal(noise, random_bits(torch.tensor(3), n, n).float() / 2**31)
    assert not torch.equal(noise, uniform_noise(torch.tensor(4), n, n))


@given(st.integers(1, 9), st.floats(0.1, 20))
def test_logits_are_those_of_embeddings_with_the_noise_added(length: int, alpha: float):
    """By a table that holds each token's noisy embedding: each token of the text is another one."""
    params = tiny()
    text, d = torch.arange(length), params.cfg.d_model
    got = fgpt.apply(fgpt.neftune(params, alpha, torch.tensor(7)), text)
    draws = uniform_noise(fold_in_seed(torch.tensor(7), "neftune"), length, d)
    table = params.wte.w.clone()
    table[:length] += alpha / math.sqrt(length * d) * draws
    untied = params.untie()
    expected = fgpt.apply(replace(untied, wte=replace(untied.wte, w=table)), text)
    close(got, expected, 1e-5, 1e-5)


def test_a_tied_head_and_its_gradient_have_no_noise():
    noisy = fgpt.neftune(TIED, ALPHA, fgpt.key(0))
    assert noisy.head is None
    assert fgpt.lm_head(noisy).w is TIED.wte.w
    h = torch.randn(3, TIED.cfg.d_model, generator=fgpt.key(1))
    assert torch.equal(fgpt.logits(noisy, h), fgpt.logits(TIED, h))


def test_no_key_and_no_alpha_are_no_noise():
    assert fgpt.neftune(TIED, ALPHA, None) is TIED
    assert fgpt.neftune(TIED, 0.0, fgpt.key(0)) is TIED
    with pytest.raises(fgpt.InputError, match="neftune alpha is -1"):
        fgpt.neftune(TIED, -1.0, fgpt.key(0))


def batch_of(text: torch.Tensor) -> fgpt.Batch:
    return fgpt.Batch(text[..., :-1], text[..., 1:], torch.ones(text[..., 1:].shape))


@pytest.mark.parametrize("quantized", [None, "nf4", "int8"])
def test_under_transforms(quantized: str | None, exact_derivatives: None):
    params = tiny(d_model=64, d_mlp=128, n_head=2)
    params = params if quantized is None else fgpt.quantize(params, quantized)
    adapters = fgpt.lora(params, fgpt.key(1), rank=2)
    adapters = tree_map(lambda x: x + 0.1 * torch.randn(x.shape, generator=fgpt.key(2)), adapters)
    seeds = torch.tensor([5, 6])

    def loss(tuned: fgpt.Adapters, text: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        return fgpt.loss(fgpt.neftune(fgpt.adapt(params, tuned), ALPHA, seed), batch_of(text))

    each = [grad(loss)(adapters, TEXT[i], seeds[i]) for i in range(2)]
    mapped = vmap(grad(loss), (None, 0, 0))(adapters, TEXT, seeds)
    for path, x in leaves(mapped).items():
        close(x, torch.stack([leaves(one)[path] for one in each]), 1e-5, 1e-4)
    tangent = tree_map(torch.ones_like, adapters)
    _, derivative = jvp(lambda tuned: loss(tuned, TEXT, seeds[0]), (adapters,), (tangent,))
    total = sum(float(x.sum()) for x in leaves(grad(loss)(adapters, TEXT, seeds[0])).values())
    assert float(derivative) == pytest.approx(total, rel=2e-3, abs=1e-4)
