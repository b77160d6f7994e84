"""Cross-entropy in chunks is its reference."""

import pytest
import torch
from builders import close, stack_trees, tokens
from builders.kernels import random_case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.nn import functional as F

import fgpt
from fgpt.kernels import cross_entropy as C


def terms_of(xw: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(xw[::2], xw[1::2], strict=True))


@given(st.integers(0, 7), st.integers(1, 3), st.booleans(), st.integers(1, 4), st.integers(0, 9))
def test_cross_entropy_is_its_reference(n: int, products: int, biased: bool, rows: int, seed: int):
    """Values and all gradients, chunk by chunk, against float64."""
    xw, b, y, u = random_case(n, 11, [5, 2, 3][:products], seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, "CHUNK_BYTES", 4 * 11 * rows)
        out, pull = vjp(lambda b, *xw: C.cross_entropy(terms_of(list(xw)), b if biased else None, y), b, *xw)
        got = pull(u)

    def exact(b: Tensor, *xw: Tensor) -> Tensor:
        logits = torch.stack([x @ w.T for x, w in terms_of(list(xw))]).sum(0) + (b if biased else 0)
        return F.nll_loss(logits.log_softmax(-1), y, reduction="none")

    expected, pull_exact = vjp(exact, b.double(), *(x.double() for x in xw))
    close(out.double(), expected, 1e-5)
    close(tuple(g.double() for g in got), pull_exact(u.double()), 1e-5)
    close(C.reference(terms_of(xw), b if biased else None, y).double(), expected, 1e-5)


def test_a_bias_trained_alone():
    (x, w), b, y, u = random_case(4, 7, [3])
    got, expected = (grad(lambda b, f=f: (u * f([(x, w)], b, y)).sum())(b) for f in (C.cross_entropy, C.reference))
    close(got, expected, 1e-5)


def test_cross_entropy_of_large_logits_is_finite():
    x, w = torch.full((2, 1), 1e4), torch.tensor([[1.0], [0.0], [-1.0]])
    out, pull = vjp(lambda x: C.cross_entropy([(x, w)], None, torch.tensor([0, 2])), x)
    assert out.tolist() == [0.0, 2e4]
    assert pull(torch.ones(2))[0].tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize("axis", [(0, None), (None, 0), (0, 0)], ids=["x", "w", "both"])
def test_cross_entropy_under_vmap_of_grad(axis: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(C, "CHUNK_BYTES", 4 * 7 * 2)
    rng, y = fgpt.key(0), tokens(7, 5)
    x = torch.randn(*([3] if axis[0] == 0 else []), 5, 4, generator=rng)
    w = torch.randn(*([3] if axis[1] == 0 else []), 7, 4, generator=rng)
    g = grad(lambda x, w: C.cross_entropy([(x, w)], None, y).square().mean(), argnums=(0, 1))
    r = grad(lambda x, w: C.reference([(x, w)], None, y).square().mean(), argnums=(0, 1))
    loop = [r(x[i] if axis[0] == 0 else x, w[i] if axis[1] == 0 else w) for i in range(3)]
    close(vmap(g, in_dims=axis)(x, w), stack_trees(loop), 1e-5)


def test_a_second_backward_of_cross_entropy():
    """torch.autograd's double backward cannot be seen coming: the first backward, recorded, is then the definition."""
    rng, y = fgpt.key(0), tokens(7, 6)
    sizes = {"x": (6, 4), "w": (7, 4), "low": (6, 2), "up": (7, 2), "b": (7,)}
    leaves = [torch.randn(size, generator=rng, dtype=torch.float64).requires_grad_() for size in sizes.values()]

    def f(x: Tensor, w: Tensor, low: Tensor, up: Tensor, b: Tensor) -> Tensor:
        return C.cross_entropy([(x, w), (low, up)], b, y)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@given(st.integers(1, 9), st.booleans(), st.integers(1, 2), st.sampled_from([torch.float32, torch.bfloat16]))
def test_plain_autograd_equals_torch_func(n: int, biased: bool, products: int, dtype: torch.dtype):
    """Outside transforms logits are written into one buffer, chunk after chunk; under torch.func.vjp they are not."""
    xw, b, y, u = random_case(n, 67, [5, 2][:products], n)
    operands = [x.to(dtype) for x in (b, *xw)]

    def f(b: Tensor, *xw: Tensor) -> Tensor:
        return C.cross_entropy(terms_of(list(xw)), b if biased else None, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, "CHUNK_BYTES", 4 * 67 * 4)
        out, pull = vmap(lambda u: vjp(f, *operands)[0])(u[None])[0], vmap(lambda u: vjp(f, *operands)[1](u))
        leaves = [x.clone().requires_grad_() for x in operands]
        plain = f(*leaves)
        got = torch.autograd.grad(plain, leaves, u, materialize_grads=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    close(plain, out, tolerance)
    close(got, tuple(g[0] for g in pull(u[None])), tolerance)
