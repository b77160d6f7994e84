"""The GPT as pure functions of its params tree:

    x   = wte[tokens] + wpe[positions]
    x   = x + attn(ln_1(x));  x = x + mlp(ln_2(x))      for each block
    out = ln_f(x) headᵀ                                  the head is wte itself if `head` is None

The tree says what is computed: without `wpe` queries and keys are rotated, an MLP with a `gate` multiplies by it, and a
block without `ln_2` has one norm for both its branches. What no leaf can say is in the Config.

Source: Radford et al. 2019 (GPT-2), section 2.3; Wang and Komatsuzaki 2021 (GPT-J); Touvron et al. 2023 (LLaMA),
section 2.2.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt._typing import shaped
from fgpt.errors import InputError
from fgpt.kernels.attention import attention, sliding
from fgpt.kernels.functorch_state import needs_higher_order
from fgpt.kernels.norm import layer_norm, rms_norm
from fgpt.kernels.remat import remat as rematerialized
from fgpt.kernels.rotary import DynamicScaling, RopeCosSin, apply_rope, rope_cos_sin
from fgpt.model.cache import KVCache, LayerKV, StaticLayerCache
from fgpt.model.config import Config
from fgpt.model.params import GPT, MLP, Attention, Block, FusedAttention, Linear, Norm, RMSNorm
from fgpt.tree import replace_at
from fgpt.weights import embed, grad_only, linear


def norm(x: Float[Tensor, "*batch d_model"], p: Norm | RMSNorm, eps: float) -> Float[Tensor, "*batch d_model"]:
    """LayerNorm or RMSNorm: see `fgpt.kernels.norm`."""
    w = p.w.to(x.dtype)
    if isinstance(p, RMSNorm):
        return rms_norm(x, w, eps)
    return layer_norm(x, w, None if p.b is None else p.b.to(x.dtype), eps)


def qkv(
    x: Float[Tensor, "*batch seq d_model"], p: Attention | FusedAttention, cfg: Config
) -> tuple[Float[Tensor, "*batch head seq d_head"], ...]:
    """Queries, keys and values of every head; of keys and values, `cfg.kv_heads`."""
    if isinstance(p, FusedAttention):
        n, kv = cfg.head_size * cfg.n_head, cfg.head_size * cfg.kv_heads
        flat = linear(x, p.qkv.w, p.qkv.b).split((n, kv, kv), -1)
    else:
        flat = linear(x, p.q.w, p.q.b), linear(x, p.k.w, p.k.b), linear(x, p.v.w, p.v.b)
    q, k, v = (rearrange(y, "... s (h d) -> ... h s d", d=cfg.head_size) for y in flat)
    q = q if p.q_norm is None else norm(q, p.q_norm, cfg.norm_eps)
    return q, k if p.k_norm is None else norm(k, p.k_norm, cfg.norm_eps), v


def attention_layer(
    x: Float[Tensor, "*batch seq d_model"],
    p: Attention | FusedAttention,
    cfg: Config,
    mask: Bool[Tensor, "*batch 1 seq key"] | None,
    past: LayerKV | StaticLayerCache | None,
    by: RopeCosSin | None,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "*batch seq d_model"], LayerKV]:
    """Attention, its scores times `scale`, and the keys and values it has seen by now."""
    q, k, v = qkv(x, p, cfg)
    q = q if scale == 1.0 else q * scale
    if by is not None:
        q, k = apply_rope(q, by, cfg.interleaved), apply_rope(k, by, cfg.interleaved)
    if isinstance(past, StaticLayerCache):
        past.k[..., past.write_index, :], past.v[..., past.write_index, :] = k, v
        k, v = past.k, past.v
    elif past is not None:
        k, v = torch.cat([past[0], k], -2), torch.cat([past[1], v], -2)
    y = rearrange(attention(q, k, v, mask), "... h s d -> ... s (h d)")
    return linear(y, p.o.w, p.o.b), (k, v)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * torch.sigmoid(x) if needs_higher_order(x) else F.silu(x),
    "relu": F.relu,
}
"""`Config.act`. torch's backward of silu has no forward mode outside torch.func.

Source: Hendrycks and Gimpel 2016 (GELUs), section 2, for the first four.
"""


def mlp(x: Float[Tensor, "*batch d_model"], p: MLP, cfg: Config) -> Float[Tensor, "*batch d_model"]:
    """down(act(up(x))), or down(act(gate(x)) ⊙ up(x)).

    Source: Shazeer 2020 (GLU Variants), equation 6.
    """
    y = linear(x, p.up.w, p.up.b)
    a = y if p.gate is None else linear(x, p.gate.w, p.gate.b)
    a = ACTIVATIONS[cfg.activation](a)
    return linear(a if p.gate is None else a * y, p.down.w, p.down.b)


def block(
    x: Float[Tensor, "*batch seq d_model"],
    p: Block,
    cfg: Config,
    mask: Bool[Tensor, "*batch 1 seq key"] | None = None,
    past: LayerKV | StaticLayerCache | None = None,
    by: RopeCosSin | None = None,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "*batch seq d_model"], LayerKV]:
    """One transformer block, its scores times `scale`, and its keys and values so far."""
    normed = norm(x, p.ln_1, cfg.norm_eps)
    y, kv = attention_layer(normed, p.attn, cfg, mask, past, by, scale)
    after = x + y
    if p.ln_2 is not None:
        normed = norm(x if cfg.parallel_residual else after, p.ln_2, cfg.norm_eps)
    return after + mlp(normed, p.mlp, cfg), kv


def block_for_gradient(x: Tensor, p: Block, cfg: Config, *args: Any) -> tuple[Tensor, LayerKV]:
    """`block` for its gradient alone: what it adds to x last is not computed, as no gradient reads it."""
    last = {"mlp.down.w": grad_only(p.mlp.down.w)}
    if cfg.parallel_residual:
        last["attn.o.w"] = grad_only(p.attn.o.w)
    return block(x, replace_at(p, last), cfg, *args)


def transformer_layers(
    params: GPT,
    tokens: Int[Tensor, "*batch seq"],
    positions: Int[Tensor, "*#batch seq"],
    mask: Bool[Tensor, "*batch 1 seq key"] | None,
    past: Sequence[LayerKV | StaticLayerCache | None],
    remat: bool = False,
    length: int | Int[Tensor, "*batch seq"] = 0,
) -> tuple[Float[Tensor, "*batch seq d_model"], tuple[LayerKV, ...]]:
    """Embedding, blocks and ln_f for tokens at these positions: the hidden states, and what each layer has seen.
    `length` is that of `turn`.
    """
    cfg = params.cfg
    x = embed(tokens, params.wte.w)
    x = x if params.wpe is None else x + embed(positions, params.wpe.w)
    by = (
        rope_cos_sin(positions, cfg.rotary_dim, cfg.rope_theta, cfg.rope_scaling, x.dtype, length)
        if cfg.rotary_dim
        else None
    )
    seen: list[LayerKV] = []
    step = rematerialized(block, recompute_fn=block_for_gradient) if remat else block
    near = mask if cfg.sliding_window is None else _near(tokens, mask, past, cfg.sliding_window)
    for i, (p, kv) in enumerate(zip(params.blocks, past, strict=True)):
        x, kv = step(x, p, cfg, mask if i in cfg.full_layers else near, kv, by, cfg.score_scale(i))
        seen.append(kv)
    return norm(x, params.ln_f, cfg.norm_eps), tuple(seen)


def _near(
    tokens: Tensor, mask: Tensor | None, past: Sequence[LayerKV | StaticLayerCache | None], window: int
) -> Bool[Tensor, "*batch 1 seq key"] | None:
    """`mask` within a window."""
    queries = tokens.shape[-1]
    before = past[0]
    keys = queries + (before[0].shape[-2] if isinstance(before, tuple) else 0) if mask is None else mask.shape[-1]
    near = sliding(mask, window, queries, keys, tokens.device)
    return near if near is None else near.expand(*tokens.shape[:-1], 1, queries, keys)


def _forward(
    params: GPT, tokens: Tensor, segments: Tensor | None, cache: KVCache, remat: bool = False
) -> tuple[Tensor, KVCache]:
    seq, past = tokens.shape[-1], cache.kv[0][0].shape[-2] if cache.kv else 0
    if past + seq > params.cfg.n_ctx:
        raise InputError(
            f"{past + seq} tokens in a row, but the model's context is {params.cfg.n_ctx}: shorten the row"
        )
    length: int | Tensor = past + seq
    if segments is None and cache.segments is None:
        positions, mask, seen = torch.arange(past, past + seq, device=tokens.device), None, None
    else:
        now = torch.ones_like(tokens) if segments is None else segments
        before = now.new_ones(*now.shape[:-1], past) if cache.segments is None else cache.segments
        seen = torch.cat([before, now], -1)
        same = now[..., :, None] == seen[..., None, :]
        length = same.sum(-1) if isinstance(params.cfg.rope_scaling, DynamicScaling) else 0
        same = same & same.new_ones(seq, past + seq).tril(past)
        positions, mask = same.sum(-1) - 1, same[..., None, :, :]
    h, kv = transformer_layers(params, tokens, positions, mask, cache.kv or (None,) * len(params.blocks), remat, length)
    return h, KVCache(kv, seen)


@shaped
def hidden(
    params: GPT,
    tokens: Int[Tensor, "*batch seq"],
    segments: Int[Tensor, "*batch seq"] | None = None,
    remat: bool = False,
) -> Float[Tensor, "*batch seq d_model"]:
    """The last hidden states, after ln_f: what a head or a loss reads.

    `segments` names the document each token of a packed row belongs to: attention stays inside a document and its
    positions count from 0. Padding is one more document, commonly 0.

    `remat` keeps only each block's input for the backward, which runs the block again: the same gradient in less memory
    and more time.

    Raises InputError when a row is longer than the context.
    """
    return _forward(params, tokens, segments, KVCache(), remat)[0]


def lm_head(params: GPT) -> Linear:
    """The output layer: its own, or the embedding table."""
    return params.head or Linear(params.wte.w)


def logits(params: GPT, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """Next-token logits of hidden states."""
    return linear(h, lm_head(params).w, lm_head(params).b)


@shaped
def apply(
    params: GPT, tokens: Int[Tensor, "*batch seq"], segments: Int[Tensor, "*batch seq"] | None = None
) -> Float[Tensor, "*batch seq vocab"]:
    """Next-token logits at every position."""
    return logits(params, hidden(params, tokens, segments))


@shaped
def forward_with_cache(
    params: GPT, tokens: Int[Tensor, "*batch seq"], cache: KVCache, segments: Int[Tensor, "*batch seq"] | None = None
) -> tuple[Float[Tensor, "*batch seq d_model"], KVCache]:
    """`hidden` of tokens that follow those in `cache`, and the cache that holds them too. Begin with `Cache()`.

    Prefill and decode are this one function: extending in any number of chunks equals one pass. Ragged prompts are
    padded on the left, with segment 0 for the padding and 1 for the text.

    Raises InputError when a row is longer than the context, or than what the keys of a dynamic rope can be kept for.
    """
    total = tokens.shape[-1] + (cache.kv[0][0].shape[-2] if cache.kv else 0)
    if params.cfg.cached_context < total <= params.cfg.n_ctx:
        raise InputError(
            f"{total} tokens in a row, but a dynamic rope turns all keys anew beyond {params.cfg.cached_context}: they "
            "cannot be kept; shorten the row, or give it to apply or hidden whole"
        )
    return _forward(params, tokens, segments, cache)
