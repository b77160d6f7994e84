"""What `test_compiled_step.py` runs in a process of its own: the compiled step beside the eager one."""

from typing import Any

import numpy as np
import pytest
import torch
from builders import close, tiny, tokens
from builders.generation import WARM_SAMPLING, adapter_sets
from torch._dynamo.utils import counters
from torch.func import vmap

import fgpt
from fgpt.generation import static_cache
from fgpt.kernels import gemv


@torch.no_grad()
def test_the_same_texts():
    """One row and several; sampled, ragged, ending at different steps, in rooms of two lengths; by adapters."""
    params, traced = tiny(n_layer=1), counters["stats"]
    prompts = [tokens(31, n, seed=n).tolist() for n in (3, 9, 5)]
    for rows in (1, 3):
        for most in (6, 14):
            expected = fgpt.generate(
                params, prompts[:rows], eos_token_id=0, max_new_tokens=most, sampling=WARM_SAMPLING, rng=fgpt.key(1)
            )
            got = fgpt.generate(
                params,
                prompts[:rows],
                eos_token_id=0,
                max_new_tokens=most,
                sampling=WARM_SAMPLING,
                rng=fgpt.key(1),
                compile=True,
            )
            assert got == expected
    assert traced["unique_graphs"] == 2  # one program for each batch, whatever the room's length
    original = [adapter_sets(params)[i] for i in (1, 2, 0)]
    expected = fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=9, adapters=original)
    assert fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=9, adapters=original, compile=True) == expected


@torch.no_grad()
@pytest.mark.parametrize("to", ["int8", "nf4"])
def test_few_bits(to: Any):
    params = fgpt.init(fgpt.Config(1, 2, 64, 24, 31, 64), fgpt.key(5))
    small = fgpt.quantize(params, to, target=r"wte|blocks\\..*")
    text = tokens(31, 1, 5)
    for _ in range(2):
        scores, rooms = zip(*(static_cache.prefill(small, text, None, 4) for _ in range(2)), strict=True)
        a, b = scores
        for _ in range(4):
            chosen = a.argmax(-1)
            text = torch.cat([text, chosen[:, None]], 1)
            a, b = (
                static_cache.decode_step(small, chosen, rooms[0]),
                static_cache.compiled_decode_step()(small, chosen, rooms[1]),
            )
            close(a, b, 1e-5)
            close(a, fgpt.apply(small, text)[:, -1], 1e-5)


def test_when_rows_are_few():
    """Compiled, not differentiated, and not mapped: a mapped row hides how many there are."""

    def uses_gemv(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(gemv.use_gemv(x, torch.ones(6, 4)))

    few = torch.compile(uses_gemv)
    mapped = torch.compile(lambda x: vmap(lambda y: y + gemv.use_gemv(y, torch.ones(6, 4)))(x))
    with torch.no_grad():
        assert [bool(few(torch.ones(n, 4))) for n in (1, 2, 8, 9)] == [True, True, True, False]
        assert few(torch.ones(2, 4, 4))
        assert not few(torch.ones(3, 3, 4))
        assert not uses_gemv(torch.ones(1, 4))
        assert not mapped(torch.zeros(3, 1, 4)).any()
    assert not few(torch.ones(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums(dtype: torch.dtype):
    """Within the bound of any order of summing, n ε |x| |W|ᵀ, beside a product in twice the digits and more."""
    x, w = (torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(dtype) for size in ((2, 3, 40), (50, 40)))
    got = gemv.sums(x, w)
    assert got.dtype == dtype
    exact = np.einsum("abi,oi->abo", *(t.double().numpy().astype(np.longdouble) for t in (x, w)))
    size = x.double().abs() @ w.double().abs().T
    assert (np.abs(got.double().numpy() - exact) <= 40 * torch.finfo(dtype).eps * size.numpy()).all()
