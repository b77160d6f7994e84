"""Attention is its reference, under every transform."""

import pytest
import torch
from builders import close
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vjp

import fgpt
from fgpt.kernels import attention as A

# ----------------------------------------------------------------------------------------------------------- attention


@given(st.integers(1, 5), st.integers(0, 4), st.booleans(), st.integers(0, 9))
def test_attention_is_its_reference(queries: int, past: int, masked: bool, seed: int):
    rng = fgpt.key(seed)
    q, k, v = (torch.randn(2, 3, n, 4, generator=rng) for n in (queries, queries + past, queries + past))
    mask = torch.rand(2, 1, queries, queries + past, generator=rng) < 0.5
    mask = (mask | torch.eye(queries, queries + past, dtype=torch.bool)) if masked else None
    u = torch.randn(2, 3, queries, 4, generator=rng)
    out, pull = vjp(lambda *x: A.attention(*x, mask), q, k, v)
    expected, pull_expected = vjp(lambda *x: A.reference(*x, mask), q, k, v)
    close(out, expected, 1e-5)
    close(pull(u), pull_expected(u), 1e-5)
    scores = q.double() @ k.double().mT / 2  # and the reference is the definition
    for i in range(queries):
        see = torch.arange(queries + past) <= i + past if mask is None else mask[:, :, i][..., None, :]
        row = scores[:, :, i : i + 1].masked_fill(~see, -torch.inf).softmax(-1) @ v.double()
        close(out[:, :, i : i + 1].double(), row, 1e-5)


# ------------------------------------------------------------------------------------------------------- cross entropy


@pytest.mark.slow
def test_a_second_backward_of_attention():
    rng = fgpt.key(0)
    q, k, v = (torch.randn(2, h, 5, 4, generator=rng, dtype=torch.float64).requires_grad_() for h in (4, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril(1).expand(2, 1, 5, 5)
    for m in (None, mask):
        assert torch.autograd.gradcheck(lambda q, k, v, m=m: A.attention(q, k, v, m), (q, k, v))
        assert torch.autograd.gradgradcheck(lambda q, k, v, m=m: A.attention(q, k, v, m), (q, k, v))
