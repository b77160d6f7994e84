"""Causal attention: softmax(q kᵀ / sqrt(d_head) + mask) v.

Source: Vaswani et al. 2017, section 3.2.1; the fused path is torch's scaled_dot_product_attention.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fgpt._typing import shaped
from fgpt.kernels.transforms import differentiated_again


def causal(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """True where a query sees a key, the last query being level with the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def reference(
    q: Float[Tensor, "*batch head query d_head"],
    k: Float[Tensor, "*batch head key d_head"],
    v: Float[Tensor, "*batch head key d_head"],
    mask: Bool[Tensor, "*batch 1 query key"] | None = None,
) -> Float[Tensor, "*batch head query d_head"]:
    """The definition, softmax in fp32. Differentiable as often as you like, in both modes."""
    seen = causal(q.shape[-2], k.shape[-2], q.device) if mask is None else mask
    scores = (q @ k.mT).float() / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype) @ v


@shaped
def attention(
    q: Float[Tensor, "*batch head query d_head"],
    k: Float[Tensor, "*batch kv key d_head"],
    v: Float[Tensor, "*batch kv key d_head"],
    mask: Bool[Tensor, "*batch 1 query key"] | None = None,
) -> Float[Tensor, "*batch head query d_head"]:
    """Attention under `mask` (True where a query sees a key); None is causal, aligned at the end.

    Fused under grad, vmap and vmap(grad). The fused kernel has neither a forward-mode rule nor a second backward, so
    jvp, jvp(grad) and grad(grad) take the reference. Where there are fewer heads of k and v, each serves as many
    consecutive heads of q.
    """
    if (group := q.shape[-3] // k.shape[-3]) > 1:
        k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    if differentiated_again():
        return reference(q, k, v, mask)
    queries, keys = q.shape[-2], k.shape[-2]
    if mask is None and 1 < queries < keys:
        mask = causal(queries, keys, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and queries > 1)
