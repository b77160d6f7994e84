"""What only a GPU has: FlashAttention over packed documents and fewer heads of keys, and the efficient kernel. A
stand-in computes by definition what the raw operators are given, and the meta device shows which of them run.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from builders import close, tiny, tokens
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fgpt
from fgpt.data.examples import Example
from fgpt.data.packing import collate
from fgpt.kernels import attention as A
from fgpt.kernels import fused_attention
from fgpt.kernels.documents import Documents
from fgpt.tree import astype, tree_map

THREE = (0, 1, 2)


class FlashByDefinition:
    """torch's raw operators, which pay no attention to a mask: [batch seq head d_head], or [token head d_head]."""

    def __init__(self):
        self.calls: list[str] = []

    def _pieces(self, q: Tensor, cu_seqlens: Tensor | None, max_q: int) -> Iterator[Any]:
        if cu_seqlens is None:
            yield from range(len(q))
            return
        assert cu_seqlens.dtype == torch.int32
        bounds = cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == len(q)
        for start, end in pairwise(bounds):
            assert 0 <= end - start <= max_q
            yield slice(start, end)

    def _scores(self, q: Tensor, k: Tensor, causal: bool) -> Tensor:
        """[head query key]"""
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) / q.shape[-1] ** 0.5
        visible = torch.ones(len(q), len(k), dtype=torch.bool).tril()
        return scores.masked_fill(~visible, float("-inf")) if causal else scores

    def _flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *rest: Any
    ) -> tuple[Tensor, ...]:
        p, causal, debug = rest
        assert (cu_q is None) == (cu_k is None)
        assert (p, debug, max_q) == (0.0, False, max_k)
        self.calls.append("forward")
        y = torch.full_like(q, float("nan"))
        logsumexp = torch.full((q.shape[1], len(q)) if cu_q is not None else (len(q), q.shape[2], q.shape[1]), 9e9)
        logsumexp = logsumexp.to(q.dtype)
        for at in self._pieces(q, cu_q, max_q):
            scores = self._scores(q[at], k[at], causal)
            group = q.shape[-2] // v.shape[-2]
            y[at] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[at].repeat_interleave(group, 1))
            if cu_q is None:
                logsumexp[at] = scores.logsumexp(-1)
            else:
                logsumexp[:, at] = scores.logsumexp(-1)
        return y, logsumexp, torch.zeros(2, dtype=torch.int64), torch.zeros(()), torch.zeros(())

    def _flash_attention_backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsumexp: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        cu_q, _, max_q, max_k, p, causal, seed, offset = rest
        assert logsumexp.is_contiguous()
        assert (p, max_q, seed.shape, offset.shape) == (0.0, max_k, (2,), ())
        self.calls.append("backward")
        dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
        group = q.shape[-2] // v.shape[-2]
        for at in self._pieces(q, cu_q, max_q):
            piece = logsumexp[at] if cu_q is None else logsumexp[:, at]
            probabilities = (self._scores(q[at], k[at], causal) - piece[..., None]).exp()
            keys, values = (x[at].repeat_interleave(group, 1) for x in (k, v))
            slopes = torch.einsum("qhd,khd->hqk", g[at], values) - (g[at] * y[at]).sum(-1).T[..., None]
            slopes = probabilities * slopes / q.shape[-1] ** 0.5
            dq[at] = torch.einsum("hqk,khd->qhd", slopes, keys)
            for d, x in ((dk, torch.einsum("hqk,qhd->khd", slopes, q[at])), (dv, None)):
                x = torch.einsum("hqk,qhd->khd", probabilities, g[at]) if x is None else x
                d[at] = x.unflatten(1, (-1, group)).sum(2)
        return dq, dk, dv


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashByDefinition:
    """In place of the raw operators, on the CPU."""
    raw = FlashByDefinition()
    monkeypatch.setattr(fused_attention, "aten", raw)
    for module in (fused_attention, A):
        monkeypatch.setattr(module, "has_flash", lambda *kind: True)
    return raw


def operands(*batch: int, kv: int = 2) -> tuple[Tensor, ...]:
    rng = fgpt.key(1)
    q = torch.randn(*batch, 4, 7, 8, generator=rng, dtype=torch.float64)
    k, v = (torch.randn(*batch, kv, 7, 8, generator=rng, dtype=torch.float64) for _ in "kv")
    return q, k, v


BOUNDS = torch.tensor([[0, 2, 3, 7, 7], [0, 7, 7, 7, 7], [0, 0, 1, 4, 7]], dtype=torch.int32)


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_documents_and_rows(flash: FlashByDefinition, kv: int, causal: bool):
    def fused(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        if causal:
            return fused_attention.fused_attention(q, k, v, None).sin().sum()
        return A.attention(q, k, v, Documents(cu_seqlens)).sin().sum()

    def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return A.reference(q, k, v, None if causal else Documents(cu_seqlens).mask(7)).sin().sum()

    q, k, v = operands(3, kv=kv)
    close(grad(fused, THREE)(q, k, v, BOUNDS), grad(reference, THREE)(q, k, v, BOUNDS), 1e-12)
    close(fused(q, k, v, BOUNDS), reference(q, k, v, BOUNDS), 1e-12)
    q, k, v = operands(2, 3, kv=kv)
    flash.calls.clear()
    got = vmap(grad(fused, THREE), (0, 0, 0, None))(q, k, v, BOUNDS)
    assert flash.calls == ["forward", "backward"]
    close(got, vmap(grad(reference, THREE), (0, 0, 0, None))(q, k, v, BOUNDS), 1e-12)
    several = torch.stack([BOUNDS, BOUNDS.roll(1, 0)], 1)
    got, expected = (vmap(grad(f, THREE), (0, 0, 0, 1))(q, k, v, several) for f in (fused, reference))
    close(got, expected, 1e-12)


def packed_batch() -> fgpt.Batch:
    lengths = [[5, 7, 3], [9, 2], [17]]
    batch = collate(
        [[Example.completion(tuple(tokens(31, n, seed=n).tolist()), 1) for n in row] for row in lengths], 20
    )
    assert batch.cu_seqlens is not None
    return batch


@pytest.mark.parametrize("remat", [False, True])
def test_a_model_over_documents(flash: FlashByDefinition, monkeypatch: pytest.MonkeyPatch, remat: bool):
    """Positions and bounds of a model with fewer heads of keys."""
    params = astype(tiny(n_head=4, n_kv=2, d_model=32), torch.float64)
    batch = packed_batch()
    masked = fgpt.Batch(batch.tokens, batch.targets, batch.weights, batch.segments, batch.loss_positions)
    trained = fgpt.trainable_leaves(params, r"blocks.*")
    got = grad(lambda a: fgpt.loss(fgpt.adapt(params, a), batch, remat))(trained)
    assert flash.calls.count("backward") == 2
    monkeypatch.undo()
    close(got, grad(lambda a: fgpt.loss(fgpt.adapt(params, a), masked))(trained), 1e-12)


# ------------------------------------------------------------------------------------------------ as a GPU chooses them


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """A function that moves trees to the meta device, which then chooses kernels as a GPU does."""

    def has_flash(device: torch.device, dtype: torch.dtype, d_head: int) -> bool:
        return dtype == torch.bfloat16

    for module in (fused_attention, A):
        monkeypatch.setattr(module, "has_flash", has_flash)
    for module in (A, sys.modules["fgpt.model.forward"]):
        monkeypatch.setattr(module, "takes_documents", has_flash)
    monkeypatch.setattr(A, "takes_mask", lambda *kind: True)
    return lambda tree: tree_map(lambda x: x.to("meta"), tree)


class Kernels(TorchDispatchMode):
    """The raw operators of attention that ran."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(func):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


FLASH = ["_flash_attention_forward", "_flash_attention_backward"]
EFFICIENT = ["_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"]
CHOICES = [
    ("causal", torch.bfloat16, FLASH),
    ("causal", torch.float32, EFFICIENT),
    ("mask", torch.bfloat16, EFFICIENT),
    ("mask", torch.float32, EFFICIENT),
    ("documents", torch.bfloat16, FLASH),
]


@pytest.mark.parametrize(("visible", "dtype", "expected"), CHOICES)
def test_kernels_per_example(gpu: Callable[[Any], Any], visible: str, dtype: torch.dtype, expected: list[str]):
    *x, bounds = gpu((*(x.to(dtype) for x in operands(2, 3)), BOUNDS))
    seen: Any = {"causal": None, "mask": Documents(bounds).mask(7), "documents": Documents(bounds)}[visible]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return A.attention(q, k, v, seen).sum()

    with Kernels() as kernels:
        gradients = vmap(grad(loss, THREE))(*x)
    assert kernels.names == expected
    for gradient, of in zip(gradients, x, strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (of.shape, dtype, of.device)


@pytest.mark.parametrize("transform", ["grad", "vmap(grad)"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_chooses(gpu: Callable[[Any], Any], dtype: torch.dtype, transform: str):
    base = tiny(n_head=4, n_kv=2, d_model=32)
    params, batch = gpu(astype(base, dtype)), gpu(packed_batch())
    adapters = gpu(fgpt.lora(base, fgpt.key(0), 2, target=r"blocks.*\.(q|k|v)"))
    batch = fgpt.Batch(batch.tokens, batch.targets, batch.weights, batch.segments, None, batch.cu_seqlens)
    gradient = grad(lambda a, b: fgpt.loss(fgpt.adapt(params, a), b))
    with Kernels() as kernels:
        (gradient if transform == "grad" else vmap(gradient, (None, 0)))(adapters, batch)
    if dtype == torch.bfloat16:
        assert kernels.names == [FLASH[0]] * 2 + [FLASH[1]] * 2
    else:
        assert not {*kernels.names} & {*FLASH}
