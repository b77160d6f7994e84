"""Each kernel is its reference, values and gradients, and costs what it says."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import LargestTensor, close, stack_trees, tiny, tokens, with_noise
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, vjp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fgpt
from fgpt.kernels import attention as A
from fgpt.kernels import cross_entropy as C
from fgpt.kernels import functorch_state
from fgpt.kernels.dropout import dropout, dropout_mask
from fgpt.kernels.quantized_linear import dequantize, quantize_matrix
from fgpt.tree import astype, tree_map

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


def terms_of(xw: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(xw[::2], xw[1::2], strict=True))


@given(st.integers(0, 7), st.integers(1, 3), st.booleans(), st.integers(1, 4), st.integers(0, 9))
def test_cross_entropy_is_its_reference(n: int, products: int, biased: bool, rows: int, seed: int):
    """Values and all gradients, chunk by chunk, against float64."""
    xw, b, y, u = case(n, 11, [5, 2, 3][:products], seed)
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


def test_a_second_backward_of_attention():
    rng = fgpt.key(0)
    q, k, v = (torch.randn(2, h, 5, 4, generator=rng, dtype=torch.float64).requires_grad_() for h in (4, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril(1).expand(2, 1, 5, 5)
    for m in (None, mask):
        assert torch.autograd.gradcheck(lambda q, k, v, m=m: A.attention(q, k, v, m), (q, k, v))
        assert torch.autograd.gradgradcheck(lambda q, k, v, m=m: A.attention(q, k, v, m), (q, k, v))


@pytest.mark.parametrize("over", ["examples", "heads", "both"])
def test_no_chunk_of_logits_is_larger_for_being_mapped(over: str, monkeypatch: pytest.MonkeyPatch):
    """The bound is on what is alive at once, all that vmap computes together included, nested maps too."""
    vocab, n, d, examples, heads = 16, 24, 4, 6, 3
    monkeypatch.setattr(C, "CHUNK_BYTES", 4 * vocab * 30)
    rng, y = fgpt.key(0), tokens(vocab, n)
    x = torch.randn(examples, n, d, generator=rng)
    w = torch.randn(heads, vocab, d, generator=rng)

    def one(x: Tensor, w: Tensor) -> Tensor:
        return C.cross_entropy([(x, w)], None, y).sum()

    runs: dict[str, Callable[[], Any]] = {
        "examples": lambda: vmap(grad(one), in_dims=(0, None))(x, w[0]),
        "heads": lambda: vmap(grad(one), in_dims=(None, 0))(x[0], w),
        "both": lambda: vmap(vmap(grad(one), in_dims=(0, None)), in_dims=(None, 0))(x, w),
    }
    with LargestTensor() as largest:
        got = runs[over]()
    logits = [math.prod(shape) for shape in largest.shapes if shape[-1:] == (vocab,) and shape[-2:] != (d, vocab)]
    assert max(logits) <= 30 * vocab
    r = grad(lambda x, w: C.reference([(x, w)], None, y).sum())
    close(
        got.reshape(-1, n, d),
        torch.stack([r(a, b) for b in (w if over != "examples" else w[:1]) for a in (x if over != "heads" else x[:1])]),
        1e-5,
    )


def test_what_is_tracked_and_mapped_at_any_level():
    states: dict[str, Any] = {}

    def record(name: str) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            states[name] = functorch_state.is_differentiated(x), functorch_state.num_vmapped(x)
            return x.square().sum()

        return f

    x = torch.ones(5, 4, 3)
    record("plain")(x)
    vmap(vmap(record("vmap")))(x)
    vmap(grad(record("vmap(grad)")))(x)
    grad(lambda x: vmap(record("grad(vmap)"))(x).sum())(x)
    vmap(record("autograd(vmap)"))(x.clone().requires_grad_())
    assert states == {
        "plain": (False, 1),
        "vmap": (False, 20),
        "vmap(grad)": (True, 5),
        "grad(vmap)": (True, 5),
        "autograd(vmap)": (True, 5),
    }


def test_a_frozen_head_costs_two_products_and_a_trained_one_four(monkeypatch: pytest.MonkeyPatch):
    n, vocab, d = 12, 50, 8
    monkeypatch.setattr(C, "CHUNK_BYTES", 4 * vocab * 5)
    (x, w), _, y, _ = case(n, vocab, [d])
    for argnums, products in ((0, 2), ((0, 1), 4)):
        f = grad(lambda x, w: C.cross_entropy([(x, w)], None, y).sum(), argnums=argnums)
        with FlopCounterMode(display=False) as flops:
            f(x, w)
        assert flops.get_total_flops() == products * 2 * n * vocab * d


@pytest.mark.parametrize("kernel", [C.cross_entropy, C.reference])
def test_full_logits_are_never_held(kernel: Any, monkeypatch: pytest.MonkeyPatch):
    n, vocab, d = 64, 50, 8
    monkeypatch.setattr(C, "CHUNK_BYTES", 4 * vocab * 10)
    (x, w), _, y, _ = case(n, vocab, [d])
    with LargestTensor() as largest:
        grad(lambda x: kernel([(x, w)], None, y).sum())(x)
    assert largest.numel == (n * vocab if kernel is C.reference else n * d)


def test_a_training_gradient_makes_no_full_logits_and_no_head_gradient(monkeypatch: pytest.MonkeyPatch):
    big = tiny(vocab_size=500, tie_word_embeddings=False)
    batch = fgpt.Batch(tokens(500, 4, 20), tokens(500, 4, 20), torch.ones(4, 20))
    monkeypatch.setattr(C, "CHUNK_BYTES", 4 * 500 * 3)
    with LargestTensor() as largest:
        grad(lambda a: fgpt.loss(fgpt.adapt(big, a), batch))(fgpt.lora(big, fgpt.key(0), 2))
    assert largest.numel < 500 * 16  # smaller than the table itself, which no step may copy or differentiate
    with LargestTensor() as largest:
        grad(lambda a: fgpt.loss(fgpt.adapt(big, a), batch))(fgpt.trainable_leaves(big, r"head\.w"))
    assert (500, 16) in largest.shapes


# -------------------------------------------------------------------------------------------------------------- dropout


def fate(seed: int, i: int, j: int) -> int:
    """The hash of one element, in Python's integers: MurmurHash3's finalizer, over Weyl counters."""

    def finalize(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    row = finalize(((i + 1) * 0x9E3779B9 + finalize(seed)) % 2**32)
    column = finalize(((j + 1) * 0x9E3779B9 + finalize(seed ^ 0x5BD1E995)) % 2**32)
    return finalize((row + column) % 2**32)


@given(st.integers(0, 2**31 - 1), st.floats(0, 0.99))
def test_a_fate_is_a_hash_of_seed_and_place(seed: int, p: float):
    """Of nothing else: the mask is the same in every program, and on every machine."""
    limit = round(p * 2**32)
    signed = [[(fate(seed, i, j) + 2**31) % 2**32 for j in range(5)] for i in range(4)]
    expected = torch.tensor([[h >= limit for h in row] for row in signed])
    got = dropout_mask(torch.tensor(seed), 4, 5, p)
    assert torch.equal(got, expected)
    assert torch.equal(dropout_mask(torch.tensor(seed), 3, 2, p), expected[:3, :2])
    x = torch.randn(2, 2, 5, generator=fgpt.key(0))
    close(dropout(x, torch.tensor(seed), p), x * expected.view(2, 2, 5) / (1 - p), 1e-5, 1e-5)
    assert dropout(x.bfloat16(), torch.tensor(seed), p).dtype == torch.bfloat16


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_fates_are_independent(p: float):
    """At the given rate; and with no pattern of rows, columns, neighbors or neighboring seeds.

    A random 512 x 512 of unit variance has a largest singular value of 2 √512; any pattern adds one above it.
    """
    n = 512
    masks = [
        (dropout_mask(torch.tensor(seed), n, n, p).float() - (1 - p)) / (p * (1 - p)) ** 0.5
        for seed in (0, 1, 2, 1 << 30)
    ]
    for i, mask in enumerate(masks):
        assert mask.mean().abs() < 5 / n
        assert torch.linalg.matrix_norm(mask, 2) < 2.15 * n**0.5
        for other in [*masks[:i], mask.T, mask.roll(1, 0), mask.roll(1, 1), mask.roll((1, 1), (0, 1))]:
            assert (mask * other).mean().abs() < 5 * 2**0.5 / n  # each pair is twice in mask * mask.T


def test_dropout_under_transforms():
    x, seeds = torch.randn(3, 8, generator=fgpt.key(0)), torch.tensor([5, 6, 7])
    masks = torch.stack([dropout_mask(s, 3, 8, 0.5) for s in seeds])
    close(vmap(lambda s: dropout(x, s, 0.5))(seeds), x * masks * 2.0, 0)
    assert len({tuple(m.flatten().tolist()) for m in masks}) == 3
    close(vmap(grad(lambda x, s: dropout(x, s, 0.5).sum()), in_dims=(None, 0))(x, seeds), masks * 2.0, 0)
    rows = vmap(lambda x: dropout(x, seeds[0], 0.5))(x[:, None])  # one seed for all: each example has the same mask
    close(rows[:, 0], x * masks[0, 0] * 2.0, 0)


# --------------------------------------------------------------------------------------------------------------- scales


def with_scaled_rows(w: Any, row: Tensor, *ab: Tensor, drop: float = 0.0) -> fgpt.Adapted:
    """With s = 3, and dropout of A's input by a seed of 5."""
    a, b = ab or (None, None)
    return fgpt.Adapted(w, a, b, row, seed=torch.tensor(5) if drop else None, scale=3.0, dropout=drop)


@pytest.mark.parametrize("least", [0.5, 0.0], ids=["far from 0", "near 0"])
@pytest.mark.parametrize(
    "needs", [(1, 0, 1, 1), (1, 0, 1, 0), (1, 1, 0, 0), (0, 0, 1, 0), (0, 1, 0, 1), (1, 0, 1, None), (0, 0, 1, None)]
)
@pytest.mark.parametrize(("rank", "drop"), [(None, 0.0), (2, 0.0), (2, 0.5)])
def test_scaled_components(needs: tuple[Any, ...], least: float, rank: int | None, drop: float):
    """By hand, and by finite differences, twice, of x, W, the scale and the bias, also where a component of the scale
    is 0; in one tensor of the width of y each way, and far from 0 in one of x's width backward; near 0 the sum is kept.
    """
    sizes = [(6, 4), (5, 4), (5,), (5,), *([(rank, 4), (5, rank)] if rank else [])]
    inputs: list[Any] = [torch.rand(size, dtype=torch.float64, generator=fgpt.key(i)) for i, size in enumerate(sizes)]
    inputs[2] += least
    if not least:
        inputs[2][3] = 0.0
    needs = (*needs, 1, 1)[: len(inputs)]
    inputs = [x if need is None else x.requires_grad_(bool(need)) for x, need in zip(inputs, needs, strict=True)]
    inputs[3] = None if needs[3] is None else inputs[3]

    def fn(x: Tensor, w: Tensor, row: Tensor, bias: Tensor | None, *ab: Tensor) -> Tensor:
        return fgpt.linear(x, with_scaled_rows(w, row, *ab, drop=drop), bias)

    x, w, row, bias, *ab = inputs
    y = x @ w.T
    if ab:
        keep = dropout_mask(torch.tensor(5), 6, 4, drop) / (1 - drop) if drop else 1.0
        y = y + 3 * ((x * keep) @ ab[0].T) @ ab[1].T
    expected = row * y if bias is None else row * y + bias
    close(fn(*inputs), expected, 1e-14)
    close(vmap(lambda x: fn(x, *inputs[1:]))(torch.stack([x, x])), torch.stack([expected, expected]), 1e-14)
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)
    with LargestTensor() as forward:
        out = fn(*inputs)
    with LargestTensor() as backward:
        out.backward(torch.ones_like(expected))
    assert forward.shapes.count(out.shape) == (1 if least else 2)
    assert backward.shapes.count(out.shape) <= 2  # one of them the ones
    assert drop or not least or backward.shapes.count(x.shape) == needs[0]


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_scaled_over_quantized(to: Any):
    """The value and the gradients of the same over the expanded matrix; int8's within the rounding of x, which the
    gradients do not see.
    """
    x, w, a, b, g = (
        torch.randn(size, generator=fgpt.key(i)) for i, size in enumerate([(96, 64), (5, 64), (2, 64), (5, 2), (96, 5)])
    )
    row, bias, q = torch.rand(5) + 0.5, torch.rand(5), quantize_matrix(w, to)
    trained = [t.requires_grad_() for t in (x, row, bias, a, b)]
    found, true = (fgpt.linear(x, with_scaled_rows(m, row, a, b), bias) for m in (q, dequantize(q)))
    grads = [torch.autograd.grad(y, trained, g) for y in (found, true)]
    for u, v in zip((found, *grads[0]), (true, *grads[1]), strict=True):
        assert (u - v).norm() / v.norm() < (1e-5 if to == "nf4" else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("least", [1.0, 0.0])
def test_the_gradient_of_a_scale_is_summed_in_fp32(dtype: torch.dtype, least: float):
    """Within rounding of the same in fp64, over 4,096 rows, with a bias as large as what it is added to, and where y'
    says nothing of y because the scale is 0.
    """
    x, w, a, b, g = (
        torch.randn(size, generator=fgpt.key(i)).to(dtype)
        for i, size in enumerate([(4096, 4), (8, 4), (2, 4), (8, 2), (4096, 8)])
    )
    row, bias = torch.linspace(least, least + 1, 8).to(dtype), torch.ones(8, dtype=dtype)

    found = torch.autograd.grad(fgpt.linear(x, with_scaled_rows(w, row.requires_grad_(), a, b), bias), row, g)[0]
    true = ((x.double() @ (w.double() + 3 * b.double() @ a.double()).T) * g.double()).sum(0)
    off = (found - true).norm() / true.norm()
    assert off < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("rows", [0, 1])
def test_scaled_rows_may_be_few_or_none(rows: int):
    sizes = [(rows, 4), (5, 4), (5,), (5,), (2, 4), (5, 2)]
    x, w, row, bias, a, b = (torch.rand(size, dtype=torch.float64, generator=fgpt.key(0)) + 0.5 for size in sizes)
    inputs = [t.requires_grad_() for t in (x, row, bias, a, b)]
    found = torch.autograd.grad(fgpt.linear(x, with_scaled_rows(w, row, a, b), bias).sum(), inputs)
    true = torch.autograd.grad((row * (x @ (w + 3 * b @ a).T) + bias).sum(), inputs)
    close(found, true, 1e-12)


# ------------------------------------------------------------------------------------------------ further derivatives


def in_doubles(**shape: Any) -> tuple[fgpt.GPT, Any, Any]:
    """A model, adapters, and a direction."""
    p = astype(tree_map(lambda x: 0.5 * x, tiny(n_layer=1, **shape)), torch.float64)
    fresh = astype(fgpt.lora(p, fgpt.key(0), 2, target=r"blocks\..*"), torch.float64)
    at = with_noise(fresh, 0.1)
    return p, at, tree_map(torch.sub, with_noise(fresh, 0.1, 1), at)


def inner(a: Any, b: Any) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)]).sum()


@pytest.mark.parametrize("remat", [False, True])
def test_a_gradient_by_a_weight_of_the_loss(remat: bool):
    """Plain autograd follows the weight of a loss and nothing that the model is given: the slope, which is linear."""
    p, at, v = in_doubles()
    rows = tokens(31, 2, 9)

    def loss(a: Any) -> Tensor:
        return fgpt.loss(fgpt.adapt(p, a), fgpt.Batch(rows[:, :-1], rows[:, 1:], torch.ones(2, 8)), remat)

    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    slope = inner(torch.func.grad(lambda a: weight * loss(a))(at), v)
    (by_weight,) = torch.autograd.grad(slope, weight)
    assert by_weight.item() == pytest.approx(inner(torch.func.grad(loss)(at), v).item(), rel=1e-12)
    assert abs(by_weight.item()) > 1e-3


def test_a_third_derivative_by_recorded_backwards():
    """That of central differences of the second."""
    p, at, v = in_doubles()
    rows = tokens(31, 2, 9)
    batch = fgpt.Batch(rows[:, :-1], rows[:, 1:], torch.ones(2, 8))

    def along(t: Tensor) -> list[Tensor]:
        """The loss at at + t v, and its first three derivatives."""
        found = [fgpt.loss(fgpt.adapt(p, tree_map(lambda x, d: x + t * d, at, v)), batch)]
        for _ in range(3):
            found += torch.autograd.grad(found[-1], t, create_graph=True)
        return found

    def at_step(t: float) -> list[float]:
        return [x.item() for x in along(torch.tensor(t, dtype=torch.float64, requires_grad=True))]

    here, h = at_step(0.0), 1e-3
    ends = [at_step(s * h) for s in (-2, -1, 1, 2)]
    for i in range(3):
        y = [end[i] for end in ends]
        assert here[i + 1] == pytest.approx((y[0] - 8 * y[1] + 8 * y[2] - y[3]) / (12 * h), rel=1e-7)


def test_dual_numbers_by_hand_through_a_recorded_gradient_of_silu():
    """Forward over reverse, without torch.func: the Hessian's product of jvp(grad)."""
    p, at, v = in_doubles(activation="silu", gated_mlp=True)
    rows = tokens(31, 2, 9)

    def loss(a: Any) -> Tensor:
        return fgpt.loss(fgpt.adapt(p, a), fgpt.Batch(rows[:, :-1], rows[:, 1:], torch.ones(2, 8)))

    with forward_ad.dual_level():
        duals = tree_map(lambda x, d: forward_ad.make_dual(x.clone().requires_grad_(), d), at, v)
        grads = torch.autograd.grad(loss(duals), tree_leaves(duals))
        got = [forward_ad.unpack_dual(g).tangent for g in grads]
    expected = torch.func.jvp(torch.func.grad(loss), (at,), (v,))[1]
    for x, y in zip(got, tree_leaves(expected), strict=True):
        assert x is not None
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-9)
