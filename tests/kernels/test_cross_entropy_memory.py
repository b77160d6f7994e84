"""Cross-entropy never makes all logits, mapped or not."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import LargestTensor, close, tiny, tokens
from builders.kernels import random_case
from torch import Tensor
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import fgpt
from fgpt.kernels import cross_entropy as C
from fgpt.kernels import functorch_state


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
    widths = (vocab, C.ALIGNMENT)  # the buffer of a chunk has aligned rows
    logits = [shape for shape in largest.shapes if shape[-1:] in ((x,) for x in widths) and shape[-2:] != (d, vocab)]
    assert max(math.prod(shape[:-1]) for shape in logits) <= 30
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
    (x, w), _, y, _ = random_case(n, vocab, [d])
    for argnums, products in ((0, 2), ((0, 1), 4)):
        f = grad(lambda x, w: C.cross_entropy([(x, w)], None, y).sum(), argnums=argnums)
        with FlopCounterMode(display=False) as flops:
            f(x, w)
        assert flops.get_total_flops() == products * 2 * n * vocab * d


@pytest.mark.parametrize("kernel", [C.cross_entropy, C.reference])
def test_full_logits_are_never_held(kernel: Any, monkeypatch: pytest.MonkeyPatch):
    n, vocab, d = 128, 50, 8
    monkeypatch.setattr(C, "CHUNK_BYTES", 4 * vocab * 10)
    (x, w), _, y, _ = random_case(n, vocab, [d])
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
