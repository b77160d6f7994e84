"""Torch's fused attention kernels under vmap, and over packed documents:

    y = softmax(q kᵀ / √d_head + mask) v

torch has no batching rule for these kernels, or none for their backward, and so runs them example by example. Here they
are an autograd.Function whose vmap makes the mapped axis part of the batch axis: one call, however many examples.

    what is seen           CPU                         CUDA
    earlier keys (causal)  flash                       flash; efficient in fp32
    those of a mask        flash                       efficient
    own document           flash, a call a document    flash with cu_seqlens, one call for all rows

    transforms   a first backward under any mixture of vmap and one grad; no forward mode and no second backward

Source: Dao 2023 (FlashAttention-2), section 3; Rabe and Staats 2021 (efficient attention).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.mapped_axis import fold, unfold

aten = torch.ops.aten

Visible: TypeAlias = Bool[Tensor, "batch 1 query key"] | Int[Tensor, "batch n"] | None
"""What a query sees: keys where a mask is True; earlier keys of its document, by the cu_seqlens of each row; or None,
all keys up to its own, or all if it is the only query.
"""

HALF = (torch.bfloat16, torch.float16)


def is_documents(visible: Tensor | None) -> TypeGuard[Tensor]:
    """Whether it is cu_seqlens."""
    return visible is not None and visible.dtype != torch.bool


def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


_compute_capability._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def has_flash(device: torch.device, dtype: torch.dtype, d_head: int) -> bool:
    """Whether CUDA's FlashAttention-2 applies, which takes cu_seqlens, and fewer heads of keys than of queries."""
    if device.type != "cuda" or dtype not in HALF or d_head % 8 or d_head > 256:
        return False
    return _compute_capability(device) >= (8, 0)


def takes_documents(device: torch.device, dtype: torch.dtype, d_head: int) -> bool:
    """Whether there is a kernel for packed documents; elsewhere they need a mask."""
    return device.type == "cpu" or has_flash(device, dtype, d_head)


def takes_mask(device: torch.device, dtype: torch.dtype, d_head: int) -> bool:
    """Whether there is a kernel for a mask, and for None."""
    return device.type == "cpu" or (device.type == "cuda" and dtype in (*HALF, torch.float32) and d_head % 8 == 0)


# ------------------------------------------------------------------------------------------------------------- kernels
# Each returns y, the logsumexp of the scores with the batch axis first, and what else its backward asks for.


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, mask is None and q.shape[-2] > 1, attn_mask=_bias(mask, q.dtype)
    )


def _cpu_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, y: Tensor, logsumexp: Tensor
) -> tuple[Tensor, ...]:
    is_causal, bias = mask is None and q.shape[-2] > 1, _bias(mask, q.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, y, logsumexp, 0.0, is_causal, attn_mask=bias
    )


def _spans(cu_seqlens: Tensor, seq: int) -> Iterator[tuple[slice, slice, slice]]:
    """The index of each document that has tokens, in [batch head seq]."""
    for row, bounds in enumerate(cu_seqlens.tolist()):
        if bounds[0] != 0 or bounds[-1] != seq or bounds != sorted(bounds):
            raise InputError(f"cu_seqlens of a row of {seq} tokens ascend from 0 to {seq}: got {bounds}")
        for start, end in pairwise(bounds):
            if start < end:
                yield slice(row, row + 1), slice(None), slice(start, end)


def _empty_like(q: Tensor) -> Tensor:
    """As the kernels return it: the heads of a token side by side."""
    return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)


def _cpu_documents(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    y, logsumexp = _documents_like(q, k, v, cu_seqlens)
    for at in _spans(cu_seqlens, q.shape[-2]):
        y[at], logsumexp[at] = _cpu(q[at], k[at], v[at], None)
    return y, logsumexp


def _documents_like(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _cpu_documents_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, y: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _grads_like(g, q, k, v, cu_seqlens, y, logsumexp)
    for at in _spans(cu_seqlens, q.shape[-2]):
        parts = _cpu_backward(g[at], q[at], k[at], v[at], None, y[at], logsumexp[at])
        for grad, part in zip(grads, parts, strict=True):
            grad[at] = part
    return grads


def _grads_like(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(k), _empty_like(v)


# A compiler does not look inside an operator, and so needs no bounds. Without a compiler an operator's first call would
# import it, which takes over a second.
_documents = torch.library.custom_op("fgpt::documents_attention", _cpu_documents, mutates_args=())
_documents.register_fake(_documents_like)
_documents_backward = torch.library.custom_op(
    "fgpt::documents_attention_backward", _cpu_documents_backward, mutates_args=()
)
_documents_backward.register_fake(_grads_like)


def _efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    bias = _aligned_bias(q, k, mask)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, mask is None and q.shape[-2] > 1)


def _efficient_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, y: Tensor, logsumexp: Tensor, *philox: Tensor
) -> tuple[Tensor, ...]:
    bias, is_causal = _aligned_bias(q, k, mask), mask is None and q.shape[-2] > 1
    backward, needs = aten._scaled_dot_product_efficient_attention_backward, [True, True, True, False]
    return backward(g, q, k, v, bias, y, logsumexp, *philox, 0.0, needs, is_causal)[:3]


def _aligned_bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The bias with rows that begin at multiples of 16 bytes, as the kernel demands."""
    bias = _bias(mask, q.dtype)
    if bias is None:
        return None
    keys = k.shape[-2]
    return F.pad(bias, (0, -keys % 8))[..., :keys].expand(*q.shape[:-1], keys)


def _flat(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[batch head seq d_head] as flash takes it: [batch seq head d_head], or [token head d_head] of all rows."""
    x = x.transpose(1, 2)
    return x if cu_seqlens is None else x.flatten(0, 1)


def _flash_arguments(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Any, ...]:
    """cu_seqlens of queries and of keys, the longest row of each, no dropout, and whether a query sees later keys.

    Rows follow each other in one sequence: between two of them lies one more empty document. No document is longer than
    a row, and a bound that is not tight costs blocks that begin and end at once.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if cu_seqlens is not None:
        rows = torch.arange(len(cu_seqlens), dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        cu_seqlens = (cu_seqlens + queries * rows[:, None]).flatten()
    return cu_seqlens, cu_seqlens, queries, keys, 0.0, queries > 1


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    operands = (_flat(x, cu_seqlens) for x in (q, k, v))
    y, logsumexp, *philox, _ = aten._flash_attention_forward(*operands, *_flash_arguments(q, k, cu_seqlens), False)
    if cu_seqlens is not None:
        y, logsumexp = y.unflatten(0, (len(q), -1)), logsumexp.unflatten(1, (len(q), -1)).transpose(0, 1)
    return y.transpose(1, 2), logsumexp, *philox


def _flash_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, y: Tensor, logsumexp: Tensor, *philox: Tensor
) -> tuple[Tensor, ...]:
    if cu_seqlens is not None:
        logsumexp = logsumexp.transpose(0, 1).flatten(1)  # [head token]
    operands = (_flat(x, cu_seqlens) for x in (g, q, k, v, y))
    arguments = _flash_arguments(q, k, cu_seqlens)
    grads = aten._flash_attention_backward(*operands, logsumexp.contiguous(), *arguments, *philox)
    if cu_seqlens is not None:
        grads = [x.unflatten(0, (len(q), -1)) for x in grads]
    return tuple(x.transpose(1, 2) for x in grads)


def _kernel(q: Tensor, visible: Visible) -> tuple[Any, Any]:
    """Forward and backward for these operands."""
    if has_flash(q.device, q.dtype, q.shape[-1]) and (visible is None or is_documents(visible)):
        return _flash, _flash_backward
    if q.device.type != "cpu":
        return _efficient, _efficient_backward
    if not is_documents(visible):
        return _cpu, _cpu_backward
    compiling = torch.compiler.is_compiling()
    return (_documents, _documents_backward) if compiling else (_cpu_documents, _cpu_documents_backward)


# ----------------------------------------------------------------------------------------------------------- transforms


def _rows(x: Tensor) -> Tensor:
    """`x` with elements of a row side by side, which the kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pull_back(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, y: Tensor, logsumexp: Tensor, *philox: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v."""
    _, backward = _kernel(q, visible)
    return tuple(backward(_rows(g), _rows(q), _rows(k), _rows(v), visible, y, logsumexp, *philox))


class _Fused(torch.autograd.Function):
    """(q, k, v, visible) -> (y, logsumexp, ..)"""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, ...]:
        forward, _ = _kernel(q, visible)
        return tuple(forward(_rows(q), _rows(k), _rows(v), visible))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if g is None:  # the definition has stood in: see `with_every_derivative`
            return None, None, None, None
        pull_back = _pull_back if torch.compiler.is_compiling() else _FusedBackward.apply
        return *pull_back(g, *ctx.saved_tensors), None  # pyright: ignore[reportGeneralTypeIssues]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, logsumexp, *philox = _Fused.apply(*fold(info.batch_size, in_dims, operands))  # pyright: ignore[reportGeneralTypeIssues]
        outputs, axes = unfold(info.batch_size, (y, logsumexp))
        return (*outputs, *philox), (*axes, *(None for _ in philox))


class _FusedBackward(torch.autograd.Function):
    """`_pull_back` under transforms."""

    forward = staticmethod(_pull_back)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError("fused attention has a first backward only: the definition has the others")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        folded = fold(
            info.batch_size, in_dims[:7], operands[:7]
        )  # what follows is a state of no random numbers, and not mapped
        return unfold(info.batch_size, _FusedBackward.apply(*folded, *operands[7:]))  # pyright: ignore[reportArgumentType]


def fused_attention(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv key d_head"],
    v: Float[Tensor, "batch kv key d_head"],
    visible: Visible,
) -> Float[Tensor, "batch head query d_head"]:
    """Attention to what is visible, differentiable once; in one call under vmap.

    Args:
        q: Queries by head.
        k: Keys by head, as many as of q; or fewer, a divisor, if `has_flash`.
        v: Values by head, as many as of k.
        visible: The keys that each query sees.
    """
    if torch.compiler.is_compiling():  # to dynamo the inputs of torch.func.grad require no gradient; views of them do
        q, k, v = (x.view_as(x) for x in (q, k, v))
    return _Fused.apply(q, k, v, visible)[0]  # pyright: ignore[reportIndexIssue]
