"""The GPT: a tree of nodes, and pure functions of it.

    x   = wte[tokens] + wpe[positions]
    x   = x + attn(ln_1(x));  x = x + mlp(ln_2(x))      for each block
    out = ln_f(x) headᵀ                                  the head is wte itself when `head` is None

Source: Radford et al. 2019 (GPT-2), section 2.3.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt._typing import shaped
from fgpt.errors import InputError
from fgpt.kernels.attention import attention
from fgpt.kernels.remat import remat as rematerialised
from fgpt.kernels.transforms import differentiated_again
from fgpt.rng import fold_in
from fgpt.tree import node, static, update
from fgpt.weights import Weight, embed, linear

# ---------------------------------------------------------------------------------------------------------- the tree


@dataclass(frozen=True)
class Config:
    """What the shapes do not say, and what `init` needs. Lives in the tree's structure as `params.cfg`."""

    n_layer: int
    n_head: int
    d_model: int
    context: int
    """Most positions a row may have: rows of `wpe`."""
    vocab: int
    d_mlp: int
    eps: float = 1e-5
    """Added to the variance in every norm."""
    tied: bool = True
    """The head is the embedding table."""


@node
class Linear:
    w: Weight
    b: Float[Tensor, " out"] | None = None


@node
class Norm:
    w: Float[Tensor, " d_model"]
    b: Float[Tensor, " d_model"] | None = None


@node
class Embedding:
    w: Weight


@node
class Attention:
    q: Linear
    k: Linear
    v: Linear
    o: Linear


@node
class FusedAttention:
    """Attention whose q, k and v are one product: the rows of `qkv` are q's, then k's, then v's."""

    qkv: Linear
    o: Linear


@node
class MLP:
    up: Linear
    down: Linear


@node
class Block:
    ln_1: Norm
    attn: Attention | FusedAttention
    ln_2: Norm
    mlp: MLP


@node
class GPT:
    wte: Embedding
    wpe: Embedding
    blocks: tuple[Block, ...]
    ln_f: Norm
    head: Linear | None
    cfg: Config = static()


KV: TypeAlias = tuple[Float[Tensor, "*batch head _past d_head"], Float[Tensor, "*batch head _past d_head"]]  # it grows


@node
class Cache:
    """What `extend` remembers of the tokens it has seen: keys and values by layer, and the tokens' segments."""

    kv: tuple[KV, ...] = ()
    segments: Int[Tensor, "*batch past"] | None = None


def init(cfg: Config, rng: torch.Generator) -> GPT:
    """Random params: N(0, 0.02), and N(0, 0.02 / sqrt(2 n_layer)) for the products that write to the residual stream.

    Source: Radford et al. 2019, section 2.3.
    """
    if cfg.d_model % cfg.n_head:
        raise InputError(f"d_model {cfg.d_model} does not divide into {cfg.n_head} heads")

    def normal(name: str, *size: int, std: float = 0.02) -> Tensor:
        return torch.empty(size, dtype=torch.float32).normal_(0, std, generator=fold_in(rng, name))

    def affine(name: str, out: int, inp: int, std: float = 0.02) -> Linear:
        return Linear(normal(name, out, inp, std=std), torch.zeros(out, dtype=torch.float32))

    def norm() -> Norm:
        ones = torch.ones(cfg.d_model, dtype=torch.float32)
        return Norm(ones, torch.zeros_like(ones))

    d, residual = cfg.d_model, 0.02 / (2 * cfg.n_layer) ** 0.5
    blocks = tuple(
        Block(
            norm(),
            Attention(
                affine(f"{i}.q", d, d), affine(f"{i}.k", d, d), affine(f"{i}.v", d, d), affine(f"{i}.o", d, d, residual)
            ),
            norm(),
            MLP(affine(f"{i}.up", cfg.d_mlp, d), affine(f"{i}.down", d, cfg.d_mlp, residual)),
        )
        for i in range(cfg.n_layer)
    )
    head = None if cfg.tied else Linear(normal("head", cfg.vocab, d))
    return GPT(
        Embedding(normal("wte", cfg.vocab, d)), Embedding(normal("wpe", cfg.context, d)), blocks, norm(), head, cfg
    )


# ----------------------------------------------------------------------------------------------------- the functions


def norm(x: Float[Tensor, "*batch d_model"], p: Norm, eps: float) -> Float[Tensor, "*batch d_model"]:
    """LayerNorm, its statistics in fp32 whatever the dtype of x.

    torch's kernel has wrong derivatives of second order under jvp of jvp, and under jacrev of jacrev and hessian where
    the scale is differentiated: silently, by several per cent. There the definition stands in.

    Source: Ba et al. 2016, section 3.1; pytorch issue 196700.
    """
    w, b = p.w.to(x.dtype), None if p.b is None else p.b.to(x.dtype)
    if not differentiated_again():
        return F.layer_norm(x, x.shape[-1:], w, b, eps)
    y = x.float() - x.float().mean(-1, keepdim=True)
    y = (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * w
    return y if b is None else y + b


def qkv(x: Float[Tensor, "*batch seq d_model"], p: Attention | FusedAttention) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [*batch seq d_model]."""
    if isinstance(p, FusedAttention):
        q, k, v = linear(x, p.qkv.w, p.qkv.b).chunk(3, -1)
        return q, k, v
    return linear(x, p.q.w, p.q.b), linear(x, p.k.w, p.k.b), linear(x, p.v.w, p.v.b)


def block(
    x: Float[Tensor, "*batch seq d_model"],
    p: Block,
    cfg: Config,
    mask: Bool[Tensor, "*batch 1 seq key"] | None,
    past: KV | None,
) -> tuple[Float[Tensor, "*batch seq d_model"], KV]:
    """One transformer block, and the keys and values it has seen by now."""
    q, k, v = (rearrange(y, "... s (h d) -> ... h s d", h=cfg.n_head) for y in qkv(norm(x, p.ln_1, cfg.eps), p.attn))
    if past is not None:
        k, v = torch.cat([past[0], k], -2), torch.cat([past[1], v], -2)
    y = rearrange(attention(q, k, v, mask), "... h s d -> ... s (h d)")
    x = x + linear(y, p.attn.o.w, p.attn.o.b)
    y = F.gelu(linear(norm(x, p.ln_2, cfg.eps), p.mlp.up.w, p.mlp.up.b), approximate="tanh")
    return x + linear(y, p.mlp.down.w, p.mlp.down.b), (k, v)


def _forward(
    params: GPT, tokens: Tensor, segments: Tensor | None, cache: Cache, keep: bool, remat: bool = False
) -> tuple[Tensor, Cache]:
    cfg, seq = params.cfg, tokens.shape[-1]
    past = cache.kv[0][0].shape[-2] if cache.kv else 0
    if past + seq > cfg.context:
        raise InputError(f"{past + seq} tokens in a row, but the model's context is {cfg.context}: shorten the row")
    if segments is None and cache.segments is None:
        positions, mask, seen = torch.arange(past, past + seq, device=tokens.device), None, None
    else:
        now = torch.ones_like(tokens) if segments is None else segments
        before = now.new_ones(*now.shape[:-1], past) if cache.segments is None else cache.segments
        seen = torch.cat([before, now], -1)
        same = now[..., :, None] == seen[..., None, :]
        same = same & same.new_ones(seq, past + seq).tril(past)
        positions, mask = same.sum(-1) - 1, same[..., None, :, :]
    x = embed(tokens, params.wte.w) + embed(positions, params.wpe.w)
    kvs: list[KV] = []
    step = rematerialised(block) if remat else block
    for i, p in enumerate(params.blocks):
        x, kv = step(x, p, cfg, mask, cache.kv[i] if cache.kv else None)
        if keep:
            kvs.append(kv)
    return norm(x, params.ln_f, cfg.eps), Cache(tuple(kvs), seen)


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
    return _forward(params, tokens, segments, Cache(), keep=False, remat=remat)[0]


def head(params: GPT) -> Linear:
    """The output layer: its own, or the embedding table."""
    return params.head or Linear(params.wte.w)


def logits(params: GPT, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """Next-token logits of hidden states."""
    return linear(h, head(params).w, head(params).b)


@shaped
def apply(
    params: GPT, tokens: Int[Tensor, "*batch seq"], segments: Int[Tensor, "*batch seq"] | None = None
) -> Float[Tensor, "*batch seq vocab"]:
    """Next-token logits at every position."""
    return logits(params, hidden(params, tokens, segments))


@shaped
def extend(
    params: GPT, tokens: Int[Tensor, "*batch seq"], cache: Cache, segments: Int[Tensor, "*batch seq"] | None = None
) -> tuple[Float[Tensor, "*batch seq d_model"], Cache]:
    """`hidden` of tokens that follow those in `cache`, and the cache that holds them too. Begin with `Cache()`.

    Prefill and decode are this one function: extending in any number of chunks equals one pass. Ragged prompts are
    padded on the left, with segment 0 for the padding and 1 for the text.
    """
    return _forward(params, tokens, segments, cache, keep=True)


def fused(p: Attention | FusedAttention) -> Linear:
    """q, k and v as one layer. Raises InputError where one of them carries an adapter, or is quantised."""
    if isinstance(p, FusedAttention):
        return p.qkv
    weights, biases = [x.w for x in (p.q, p.k, p.v)], [x.b for x in (p.q, p.k, p.v) if x.b is not None]
    if not all(isinstance(w, Tensor) for w in weights):
        raise InputError("q, k and v are quantised or adapted already: fuse the plain base, then quantize and adapt it")
    return Linear(torch.cat(weights), torch.cat(biases) if biases else None)  # pyright: ignore[reportArgumentType]


def fuse(params: GPT) -> GPT:
    """The same model with q, k and v of every block in one product. A LoRA on `attn.qkv` then shares its A among the
    three, which is what PEFT's LoRA on GPT-2's c_attn does.
    """
    return update(
        params, {f"blocks.{i}.attn": FusedAttention(fused(p.attn), p.attn.o) for i, p in enumerate(params.blocks)}
    )
