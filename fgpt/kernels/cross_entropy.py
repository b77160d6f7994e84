"""Cross entropy of a linear head, in chunks: -log softmax(logits)[y], with never more than a chunk of logits alive.

A head is a sum of terms, logits = Σ_j x_j W_jᵀ + b: one term for a plain weight, one more for each adapter on it
(x_j = s·h Aᵀ, W_j = B). The loss of a row depends on that row alone, so its gradient is known as soon as its logits
are:

    ∂nll_i/∂x_ij = (softmax(logits_i) - e_y) W_j

The forward pass computes it while the logits are in cache, and the backward only scales it: two GEMMs for a frozen
head; recomputing in the backward would take three.

Outside transforms the logits of every chunk are written into one buffer whose rows are aligned: GPT-2's 50,257 logits
are no multiple of a cache line, and a matrix product whose result has such rows takes 1.3 times as long on a CPU, and
may leave the fast kernels on a GPU.

    reference     all logits at once, plain torch
    fast path     chunks, each with its part of the gradient
    transforms    chunks under grad, vmap and both in either order, smaller ones under vmap; under forward mode and
                  nested derivatives the reference; a backward that is recorded computes its gradients by operators that
                  have derivatives of every order
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.kernels.functorch_state import (
    in_transform_or_compile,
    is_differentiated,
    is_mapped,
    is_recorded_by_autograd,
    needs_higher_order,
    num_vmapped,
)
from fgpt.kernels.gemv import dense_linear
from fgpt.kernels.mapped_axis import fold, unfold
from fgpt.kernels.onednn_linear import input_grad, use_onednn
from fgpt.kernels.precision import at_least_fp32

CHUNK_BYTES = 64 << 20
"""Bytes of fp32 logits alive at once on a CPU, all examples of a vmap together: 333 rows of GPT-2's vocabulary, enough
for full GEMM speed.
"""
DEVICE_SHARE = 64
"""On a GPU a chunk may have one part in 64 of its memory, 1.3 GB of 80: a small product leaves most of it idle. It is a
share of the memory that there is, not of what is free, so that a step is a function of its arguments.
"""
ALIGNMENT = 64
"""Each row of logits begins at a multiple of 64 elements."""

ROW_UNIT = 32
"""oneDNN's products have rows in units of so many: see `onednn_linear.ROW_UNITS`."""

Terms = list[tuple[Float[Tensor, "n _in"], Float[Tensor, "vocab _in"]]]


def reference(terms: Terms, b: Float[Tensor, " vocab"] | None, y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The definition, softmax in fp32."""
    return F.cross_entropy(_logits(terms, b), y, reduction="none")


def _logits(terms: Terms, b: Tensor | None, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
    """The logits of these rows, in at least fp32. With `out`, a buffer in the dtype of x, they are computed there."""
    (x, w), *others = terms
    if out is None:
        logits = dense_linear(x[rows], w, b)
        for x, w in others:
            logits = torch.addmm(logits, x[rows].to(logits.dtype), w.to(logits.dtype).T)
    else:
        x = x[rows]
        logits = torch.mm(x, w.T, out=out[: len(x)]) if b is None else torch.addmm(b, x, w.T, out=out[: len(x)])
        for x, w in others:
            logits.addmm_(x[rows].to(logits.dtype), w.to(logits.dtype).T)
    return at_least_fp32(logits)


def _chunk_bytes(device: torch.device) -> int:
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return max(CHUNK_BYTES, torch.cuda.get_device_properties(device).total_memory // DEVICE_SHARE)
    return CHUNK_BYTES


def _chunks(terms: Terms, b: Tensor | None) -> list[slice]:
    """Slices of the rows, all of about one size: the last few rows by themselves would be a slow product. All but the
    last have a multiple of `ROW_UNIT` rows.
    """
    n, vocab = terms[0][0].shape[0], terms[0][1].shape[0]
    copies = num_vmapped(b, *(x for pair in terms for x in pair))
    most = max(1, _chunk_bytes(terms[0][0].device) // (4 * vocab * copies))
    if n == 0:
        return [slice(0, 0)]
    most = most - most % ROW_UNIT if most > ROW_UNIT else most
    rows = math.ceil(n / math.ceil(n / most))
    if ROW_UNIT < rows < n:
        rows = -(-rows // ROW_UNIT) * ROW_UNIT
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _aligned_buffer(terms: Terms, chunks: list[slice]) -> Tensor | None:
    """Room for the logits of a chunk, each row aligned. None under transforms, where nothing is written in place, and
    for oneDNN, which does not need it.
    """
    (x, w), vocab = terms[0], terms[0][1].shape[0]
    if in_transform_or_compile() or x.dtype != w.dtype or use_onednn(x, w):
        return None
    rows = max(chunk.stop - chunk.start for chunk in chunks)
    return x.new_empty(rows, -(-vocab // ALIGNMENT) * ALIGNMENT)[:, :vocab]


class _CrossEntropy(torch.autograd.Function):
    """(differentiate, y, b, x_1, W_1, x_2, W_2, ...) -> (nll, ∂nll/∂x_1, ∂nll/∂x_2, ...)"""

    @staticmethod
    def forward(differentiate: bool, y: Tensor, b: Tensor | None, *xw: Tensor) -> tuple[Tensor, ...]:
        terms = list(zip(xw[::2], xw[1::2], strict=True))
        nll: list[Tensor] = []
        dxs: list[list[Tensor]] = [[] for _ in terms]
        chunks = _chunks(terms, b)
        buffer = _aligned_buffer(terms, chunks)
        for rows in chunks:
            logits, target = _logits(terms, b, rows, buffer), y[rows]
            top, chosen = logits.amax(-1, keepdim=True), logits.gather(-1, target[:, None])
            p = logits.sub_(top).exp_()  # softmax times its sum z, in place: logsumexp would hold a second chunk
            z = p.sum(-1, keepdim=True)
            nll.append((top + z.log() - chosen).squeeze(-1))
            if differentiate:
                if buffer is not None and p.dtype != buffer.dtype:
                    p = buffer[: len(p)].copy_(p)  # rounded to half precision for the product, and aligned again
                for dx, (x, w) in zip(dxs, terms, strict=True):
                    dx.append((input_grad(p.to(w.dtype), w) / z - F.embedding(target, w)).to(x.dtype))
        return torch.cat(nll), *(torch.cat(dx) for dx in dxs if dx)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output[1:])

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n = (len(ctx.saved_tensors) - 2) // 3
        y, b, *rest = ctx.saved_tensors
        terms, dxs = list(zip(rest[: 2 * n : 2], rest[1 : 2 * n : 2], strict=True)), rest[2 * n :]
        if grad[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        if is_recorded_by_autograd(b, *rest):
            return None, None, *_recorded_backward(terms, b, y, grad[0], ctx.needs_input_grad[2:])
        g = grad[0][:, None]
        need_b, needs_w = ctx.needs_input_grad[2], ctx.needs_input_grad[4::2]
        db, dws = None, [None] * n
        if need_b or any(needs_w):
            db, dws = _head_gradients(terms, b, y, g, need_b, needs_w)
        out: list[Tensor | None] = []
        for dx, dw in zip(dxs, dws, strict=True):
            out += [dx * g.to(dx.dtype), dw]
        return None, None, db, *out

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Rows are rows, whichever example they are of: the mapped axis joins theirs. The head is not mapped."""
        operands, rows = list(inputs), slice(1, None, 2)
        operands[rows] = fold(info.batch_size, in_dims[rows], operands[rows])  # y and each x_j
        return unfold(info.batch_size, _CrossEntropy.apply(*operands))  # pyright: ignore[reportArgumentType]


class _MappedHeadCrossEntropy(_CrossEntropy):
    """The same, if vmap maps over the head: each example has logits of its own matrix."""

    generate_vmap_rule = True
    vmap = torch.autograd.Function.vmap


def _head_gradients(
    terms: Terms, b: Tensor | None, y: Tensor, g: Tensor, need_b: bool, needs_w: tuple[bool, ...]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """db = Σ_i g_i (p_i - e_y) and dW_j = Σ_i g_i (p_i - e_y) x_ijᵀ: a trained head computes its logits once more."""
    db = torch.zeros_like(b) if b is not None and need_b else None
    dws = {j: torch.zeros_like(w) for j, (_, w) in enumerate(terms) if needs_w[j]}
    chunks = _chunks(terms, b)
    buffer = _aligned_buffer(terms, chunks)
    for rows in chunks:
        gp = _logits(terms, b, rows, buffer).softmax(-1) * g[rows]
        for j, dw in dws.items():
            x = terms[j][0]
            dws[j] = dw + gp.to(x.dtype).T @ x[rows]
        db = None if db is None else db + gp.sum(0)
    for j, dw in dws.items():
        dws[j] = dw.index_add(0, y, -(g * terms[j][0]).to(dw.dtype))
    db = None if db is None else db.index_add(0, y, -g.squeeze(-1).to(db.dtype))
    return db, [dws.get(j) for j in range(len(terms))]


def _recorded_backward(
    terms: Terms, b: Tensor | None, y: Tensor, g: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of b, x_1, W_1, x_2, W_2, ..., by operators that have derivatives of every order."""
    off = _logits(terms, b).softmax(-1) - F.one_hot(y, terms[0][1].shape[0])
    off = off * g[:, None]
    db = off.sum(0).to(b.dtype) if b is not None and needs[0] else None
    out: list[Tensor | None] = []
    for (x, w), needs_x, needs_w in zip(terms, needs[1::2], needs[2::2], strict=True):
        out += [off.to(x.dtype) @ w if needs_x else None, off.to(w.dtype).T @ x if needs_w else None]
    return db, *out


@check_shapes
def cross_entropy(terms: Terms, b: Float[Tensor, " vocab"] | None, y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Negative log-likelihood in nats of class y_i under softmax(Σ_j x_ij W_jᵀ + b), in fp32, or in fp64 if x is.

    Chunked under grad, vmap and both in either order; the reference under jvp and nested grads.

    Args:
        terms: Pairs (x_j, W_j): hidden states [n, in] and matrices [vocab, in].
        b: The bias of the head.
        y: The class of each row.
    """
    operands: list[Any] = [b, *(x for pair in terms for x in pair)]
    if needs_higher_order(*operands):
        return reference(terms, b, y)
    if torch.compiler.is_compiling():
        # To dynamo the inputs of torch.func.grad require no gradient, and theirs would be left out; views of them do.
        operands = [None if x is None else x.view_as(x) for x in operands]
    differentiate = torch.is_grad_enabled() and is_differentiated(*operands)
    if torch.compiler.is_compiling() and not differentiate:  # dynamo cannot call a Function that nothing differentiates
        return _CrossEntropy.forward(False, y, *operands)[0]
    function = _MappedHeadCrossEntropy if any(is_mapped(x) for x in operands[::2] if x is not None) else _CrossEntropy
    return function.apply(differentiate, y, *operands)[0]  # pyright: ignore
