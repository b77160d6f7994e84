"""Causal attention: softmax(q kᵀ / sqrt(d_head) + mask) v.

    reference     plain torch, softmax in fp32
    fast path     torch's fused scaled_dot_product_attention
    transforms    fused under grad, vmap and both in either order; under forward mode, nested derivatives and a backward
                  that is recorded the reference; compiled under vmap the reference, too

Source: Vaswani et al. 2017, section 3.2.1.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.kernels.functorch_state import needs_higher_order
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
    k: Float[Tensor, "*batch head key d_head"],
    v: Float[Tensor, "*batch head key d_head"],
    mask: Bool[Tensor, "*batch 1 query key"] | None = None,
) -> Float[Tensor, "*batch head query d_head"]:
    """The definition, softmax in fp32. Differentiable to any order, in both modes."""
    visible = causal(q.shape[-2], k.shape[-2], q.device) if mask is None else mask
    # einsum, as torch 2.11 compiles no vmap of a matrix product whose sizes vary
    scores = at_least_fp32(torch.einsum("...qd,...kd->...qk", q, k)) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype)
    return torch.einsum("...qk,...kd->...qd", weights, v)


@check_shapes
def attention(
    q: Float[Tensor, "*batch head query d_head"],
    k: Float[Tensor, "*batch kv key d_head"],
    v: Float[Tensor, "*batch kv key d_head"],
    mask: Bool[Tensor, "*batch 1 query key"] | None = None,
) -> Float[Tensor, "*batch head query d_head"]:
    """Attention under a mask.

    Fused under grad, vmap and both in either order. The fused kernel has neither a forward-mode rule nor a second
    backward, so jvp, jvp(grad) and grad(grad) take the reference, and so does a backward that is recorded
    (create_graph=True) or of a gradient that is.

    Args:
        q: Queries by head.
        k: Keys by head. If there are fewer heads than of q, each serves a group of consecutive heads of q.
        v: Values by head, as many as of k.
        mask: True if a query sees a key; None is causal, aligned at the end.
    """
    if (group := q.shape[-3] // k.shape[-3]) > 1:
        k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    if needs_higher_order(q, k, v):
        return reference(q, k, v, mask)
    queries, keys = q.shape[-2], k.shape[-2]
    if mask is None and 1 < queries < keys:
        mask = causal(queries, keys, q.device)
    is_causal = mask is None
    if queries == 1:  # a branch, as a compiler's answer for a width that varies would be no bool
        is_causal = False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    unfused = q.ndim < 4  # torch fuses no attention with fewer axes
    return with_every_derivative(reference, y, q, k, v, mask, second=unfused)
