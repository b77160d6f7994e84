"""Each kernel is its reference, values and gradients, and costs what it says."""

from typing import Any

import pytest
import torch
from conftest import close, stack, tiny, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fgpt
from fgpt.kernels import attention as A
from fgpt.kernels import cross_entropy as C

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

Case = tuple[list[Tensor], Tensor, Tensor, Tensor]


def case(n: int, vocab: int, widths: list[int], seed: int = 0) -> Case:
    rng = fgpt.key(seed)
    xw = [torch.randn(size, d, generator=rng) for d in widths for size in (n, vocab)]
    return (
        xw,
        torch.randn(vocab, generator=rng),
        torch.randint(vocab, (n,), generator=rng),
        torch.rand(n, generator=rng),
    )


def paired(xw: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(xw[::2], xw[1::2], strict=True))


@given(st.integers(0, 7), st.integers(1, 3), st.booleans(), st.integers(1, 4), st.integers(0, 9))
def test_cross_entropy_is_its_reference(n: int, products: int, biased: bool, rows: int, seed: int):
    """Values and all gradients, chunk by chunk, against float64."""
    xw, b, y, u = case(n, 11, [5, 2, 3][:products], seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, "CHUNK_BYTES", 4 * 11 * rows)
        out, pull = vjp(lambda b, *xw: C.cross_entropy(paired(list(xw)), b if biased else None, y), b, *xw)
        got = pull(u)

    def exact(b: Tensor, *xw: Tensor) -> Tensor:
        logits = torch.stack([x @ w.T for x, w in paired(list(xw))]).sum(0) + (b if biased else 0)
        return F.nll_loss(logits.log_softmax(-1), y, reduction="none")

    expected, pull_exact = vjp(exact, b.double(), *(x.double() for x in xw))
    close(out.double(), expected, 1e-5)
    close(tuple(g.double() for g in got), pull_exact(u.double()), 1e-5)
    close(C.reference(paired(xw), b if biased else None, y).double(), expected, 1e-5)


def test_a_bias_trained_alone():
    (x, w), b, y, u = case(4, 7, [3])
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
    close(vmap(g, in_dims=axis)(x, w), stack(loop), 1e-5)


def test_cross_entropy_refuses_a_second_backward_that_it_does_not_know():
    """torch.autograd's double backward cannot be seen coming; a wrong Hessian would be silent."""
    (x, w), _, y, _ = case(4, 7, [3])
    x.requires_grad_()
    (g,) = torch.autograd.grad(C.cross_entropy([(x, w)], None, y).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first backward only"):
        torch.autograd.grad(g.square().sum(), x)


def test_a_frozen_head_costs_two_products_and_a_trained_one_four(monkeypatch: pytest.MonkeyPatch):
    n, vocab, d = 12, 50, 8
    monkeypatch.setattr(C, "CHUNK_BYTES", 4 * vocab * 5)
    (x, w), _, y, _ = case(n, vocab, [d])
    for argnums, products in ((0, 2), ((0, 1), 4)):
        f = grad(lambda x, w: C.cross_entropy([(x, w)], None, y).sum(), argnums=argnums)
        with FlopCounterMode(display=False) as flops:
            f(x, w)
        assert flops.get_total_flops() == products * 2 * n * vocab * d


class Largest(TorchDispatchMode):
    """The most elements that a new tensor had, and every new tensor's shape. Views are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.shapes = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in old:
                self.numel = max(self.numel, x.numel())
                self.shapes.add(tuple(x.shape))
        return out


@pytest.mark.parametrize("kernel", [C.cross_entropy, C.reference])
def test_full_logits_are_never_held(kernel: Any, monkeypatch: pytest.MonkeyPatch):
    n, vocab, d = 64, 50, 8
    monkeypatch.setattr(C, "CHUNK_BYTES", 4 * vocab * 10)
    (x, w), _, y, _ = case(n, vocab, [d])
    with Largest() as seen:
        grad(lambda x: kernel([(x, w)], None, y).sum())(x)
    assert seen.numel == (n * vocab if kernel is C.reference else n * d)


def test_a_training_gradient_makes_no_full_logits_and_no_head_gradient(monkeypatch: pytest.MonkeyPatch):
    big = tiny(vocab=500, tied=False)
    batch = fgpt.Batch(tokens(500, 4, 20), tokens(500, 4, 20), torch.ones(4, 20))
    monkeypatch.setattr(C, "CHUNK_BYTES", 4 * 500 * 3)
    with Largest() as seen:
        grad(lambda a: fgpt.loss(fgpt.adapt(big, a), batch))(fgpt.lora(big, fgpt.key(0), 2))
    assert seen.numel < 500 * 16  # smaller than the table itself, which no step may copy or differentiate
    with Largest() as seen:
        grad(lambda a: fgpt.loss(fgpt.adapt(big, a), batch))(fgpt.tune(big, r"head\.w"))
    assert (500, 16) in seen.shapes
