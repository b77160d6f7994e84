"""Causal attention: softmax(q kᵀ / sqrt(d_head) + mask) v.

    reference     plain torch, softmax in fp32
    fast path     torch's fused kernels: `scaled_dot_product_attention`, and `fused_attention` under vmap and for
                  packed documents
    transforms    fused under grad, vmap and both in either order; under forward mode, nested derivatives and a backward
                  that is recorded the reference; compiled under vmap the reference, too. If cotangents alone are
                  mapped, as in jacrev, torch runs its backward once for each

Source: Vaswani et al. 2017, section 3.2.1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.kernels.documents import Documents
from fgpt.kernels.functorch_state import in_vmap, needs_higher_order
from fgpt.kernels.fused_attention import fused_attention, has_flash, is_documents, takes_documents, takes_mask
from fgpt.kernels.precision import at_least_fp32
from fgpt.kernels.recordable import with_every_derivative


def causal(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """True if a query sees a key; the last query is at the position of the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def sliding(
    mask: Bool[Tensor, "*batch 1 query key"] | None, window: int, queries: int, keys: int, device: torch.device
) -> Bool[Tensor, "*batch 1 query key"] | Bool[Tensor, "1 query key"] | None:
    """A mask, limited to the last keys that a query sees.

    Args:
        mask: True if a query sees a key; None is causal.
        window: How many keys a query sees at most, its own included.
        queries: The number of queries.
        keys: The number of keys; the last is at the position of the last query.
        device: Of the result.

    Returns:
        The mask; None if it is causal and nothing is beyond the window.

    Source: Beltagy et al. 2020 (Longformer), section 3.1; Jiang et al. 2023 (Mistral 7B), section 2.
    """
    if keys <= window:
        return mask
    if mask is None:
        return causal(queries, keys, device).triu(keys - queries - window + 1)[None]
    visible_from_here = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (visible_from_here <= window)


def reference(
    q: Float[Tensor, "*batch head query d_head"],
    k: Float[Tensor, "*batch kv key d_head"],
    v: Float[Tensor, "*batch kv key d_head"],
    mask: Bool[Tensor, "*batch 1 query key"] | Documents | None = None,
    edit: Callable[[str, Tensor], Tensor] | None = None,
) -> Float[Tensor, "*batch head query d_head"]:
    """The definition, softmax in fp32. Differentiable to any order, in both modes.

    Args:
        q: As in `attention`.
        k: As in `attention`.
        v: As in `attention`.
        mask: As in `attention`.
        edit: From "scores" or "weights", [*batch head query key], to what replaces them. The mask comes in between.
    """
    k, v = _repeat_heads(q, k, v)
    mask = causal(q.shape[-2], k.shape[-2], q.device) if mask is None else mask
    mask = mask.mask(q.shape[-2]) if isinstance(mask, Documents) else mask
    # einsum, as torch 2.11 compiles no vmap of a matrix product whose sizes vary
    scores = at_least_fp32(torch.einsum("...qd,...kd->...qk", q, k)) / q.shape[-1] ** 0.5
    scores = scores if edit is None else edit("scores", scores)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype)
    weights = weights if edit is None else edit("weights", weights)
    return torch.einsum("...qk,...kd->...qd", weights, v)


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as q."""
    group = q.shape[-3] // k.shape[-3]
    return (k, v) if group == 1 else (k.repeat_interleave(group, -3), v.repeat_interleave(group, -3))


def _reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """The definition for a mask or for cu_seqlens."""
    return reference(q, k, v, Documents(visible) if is_documents(visible) else visible)


@check_shapes
def attention(
    q: Float[Tensor, "*batch head query d_head"],
    k: Float[Tensor, "*batch kv key d_head"],
    v: Float[Tensor, "*batch kv key d_head"],
    mask: Bool[Tensor, "*batch 1 query key"] | Documents | None = None,
) -> Float[Tensor, "*batch head query d_head"]:
    """Attention under a mask.

    Fused under grad, vmap and both in either order. The fused kernel has neither a forward-mode rule nor a second
    backward, so jvp, jvp(grad) and grad(grad) take the reference, and so does a backward that is recorded
    (create_graph=True) or of a gradient that is.

    Args:
        q: Queries by head.
        k: Keys by head. If there are fewer heads than of q, each serves a group of consecutive heads of q.
        v: Values by head, as many as of k.
        mask: True if a query sees a key; or the documents that lie side by side in a row; None is causal, aligned at
            the end.
    """
    visible = mask.cu_seqlens if isinstance(mask, Documents) else mask
    unsupported = isinstance(mask, Documents) and not takes_documents(q.device, q.dtype, q.shape[-1])
    if needs_higher_order(q, k, v) or unsupported:
        return _reference(q, k, v, visible)
    return with_every_derivative(_reference, _attend(q, k, v, visible), q, k, v, visible)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """By torch's kernels, which want one batch axis."""
    shape, kind = q.shape, (q.device, q.dtype, q.shape[-1])
    q, k, v = (_with_one_batch_axis(x, 3) for x in (q, k, v))
    rows, _, queries, _ = q.shape
    keys = k.shape[-2]
    if is_documents(visible):
        k, v = (k, v) if has_flash(*kind) else _repeat_heads(q, k, v)
        return fused_attention(q, k, v, _with_one_batch_axis(visible, 1)).view(shape)
    mask = None if visible is None else _with_one_batch_axis(visible, 3)
    if mask is None and 1 < queries < keys:
        mask = causal(queries, keys, q.device)[None, None]
    if mask is not None and k.shape[1] < q.shape[1] and _are_few(queries, k):
        # Heads with the same keys as more queries of one head: a mask for each is less than keys and values for each.
        group = q.shape[1] // k.shape[1]
        q, mask = q.unflatten(1, (-1, group)).flatten(2, 3), mask.repeat(1, 1, group, 1)
    elif mask is not None or not has_flash(*kind):
        k, v = _repeat_heads(q, k, v)
    if in_vmap() and takes_mask(*kind):
        y = fused_attention(q, k, v, None if mask is None else mask.expand(rows, 1, q.shape[2], keys))
    else:
        is_causal, fewer_keys = mask is None, False
        if queries == 1:  # branches, as a compiler's answer for a size that varies would be no bool
            is_causal = False
        if k.shape[1] < q.shape[1]:
            fewer_keys = True
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=fewer_keys)
    return y.reshape(shape)


def _are_few(queries: int, k: Float[Tensor, "rows kv key d_head"]) -> bool:
    """Whether a mask has fewer elements than keys and values. A compiled program takes sizes as they come: it knows one
    query from several.
    """
    return queries == 1 if torch.compiler.is_compiling() else queries < 2 * k.shape[1] * k.shape[3]


def _with_one_batch_axis(x: Tensor, others: int) -> Tensor:
    """`x`, whose last `others` axes are no batch axes."""
    return x[None] if x.ndim == others else x.flatten(0, -others - 1)
