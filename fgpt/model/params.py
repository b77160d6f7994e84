"""The params tree of a GPT: its nodes, its shapes, random initialization, and the fused form of q, k and v.

The paths of the tree are the architecture: `wte.w`, `blocks.3.attn.q.w`, `blocks.3.mlp.down.b`, `ln_f.w`. What is
absent is not computed: see `fgpt.model.forward`.
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.errors import InputError, check_choice
from fgpt.model.config import BIASES, Activation, Config, NormType, NumNorms
from fgpt.rng import fold_in
from fgpt.tree import leaves, node, replace_at, static
from fgpt.weights import Weight


@node
class Linear:
    """x -> x Wᵀ + b, with w [out, in]; a b that is None is not added."""

    w: Weight
    b: Float[Tensor, " out"] | None = None


@node
class Norm:
    """LayerNorm: gain w and bias b."""

    w: Float[Tensor, " d_model"]
    b: Float[Tensor, " d_model"] | None = None


@node
class RMSNorm:
    """RMSNorm: gain w."""

    w: Float[Tensor, " d_model"]


@node
class EmbeddingNoise:
    """Noise uniform in ±alpha / √(seq · d_model), added to each element of a sequence's embeddings."""

    seed: Int[Tensor, ""]
    alpha: float = static()


@node
class Embedding:
    """A table, w [rows, d_model], of tokens or of positions. Noise is of training alone, see `fgpt.neftune`."""

    w: Weight
    noise: EmbeddingNoise | None = None


@node
class Attention:
    """Attention: queries, keys, values, the output, and norms of each head of q and k if there are any."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None


@node
class FusedAttention:
    """Attention whose q, k and v are one product: the rows of `qkv` are q's, then k's, then v's."""

    qkv: Linear
    o: Linear
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None


@node
class MLP:
    """down(act(up(x))), or with a gate down(act(gate(x)) ⊙ up(x))."""

    up: Linear
    down: Linear
    gate: Linear | None = None


@node
class Block:
    """A transformer block. Without `ln_2` attention and MLP both read `ln_1`."""

    ln_1: Norm | RMSNorm
    attn: Attention | FusedAttention
    ln_2: Norm | RMSNorm | None
    mlp: MLP


@node
class GPT:
    """A model: its weights are a tree, and its config is part of the tree's structure.

    Args:
        wte: The token embedding, [vocab, d_model].
        wpe: The embedding of learned positions, [n_ctx, d_model]; None if q and k are rotated instead.
        blocks: The transformer blocks, the first to be computed first.
        ln_f: The norm after the last block.
        head: The output layer, [vocab, d_model]; None if it is the embedding table.
        cfg: What the shapes do not say.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> [path for path in leaves(params) if ".mlp." in path]
    ['blocks.0.mlp.up.w', 'blocks.0.mlp.up.b', 'blocks.0.mlp.down.w', 'blocks.0.mlp.down.b']
    >>> params.cfg.n_layer
    1
    """

    wte: Embedding
    wpe: Embedding | None
    blocks: tuple[Block, ...]
    ln_f: Norm | RMSNorm
    head: Linear | None
    cfg: Config = static()

    def untie(self) -> "GPT":
        """The same model with a head of its own: the embedding table, shared until one of the two is adapted."""
        if self.head is not None:
            return self
        return replace(self, head=Linear(self.wte.w), cfg=replace(self.cfg, tie_word_embeddings=False))


def abstract_params(cfg: Config) -> GPT:
    """The params tree of a config with leaves on the meta device, without storage: the shapes that files must have.

    Raises:
        InputError: if the sizes of `cfg` do not fit one another, or names a bias, a norm or an
            activation that does not exist.
    """
    check_choice("activation", cfg.activation, Activation)
    check_choice("norm_type", cfg.norm_type, NormType)
    check_choice("n_norms", cfg.n_norms, NumNorms)
    d, m, n, kv = cfg.d_model, cfg.d_mlp, cfg.head_size * cfg.n_head, cfg.head_size * cfg.kv_heads
    if cfg.d_head is None and d % cfg.n_head:
        raise InputError(f"d_model {d} does not divide into {cfg.n_head} heads")
    if cfg.n_head % cfg.kv_heads:
        raise InputError(f"{cfg.n_head} heads of q do not divide among {cfg.kv_heads} of k and v")
    if cfg.rotary_dim % 2 or cfg.rotary_dim > cfg.head_size:
        raise InputError(
            f"{cfg.rotary_dim} rotated components of a head of {cfg.head_size}: expected an even number, at most all"
        )
    if cfg.sliding_window is not None and cfg.sliding_window < 1:
        raise InputError(f"a window of {cfg.sliding_window} tokens: expected 1 or more, or None")
    if cfg.n_norms == 1 and not cfg.parallel_residual:
        raise InputError("one norm in a block serves parallel branches: expected parallel_residual=True, or n_norms=2")
    if unknown := set(cfg.biases) - BIASES:
        raise InputError(f"no layer {min(unknown)!r} for a bias: expected a set of {', '.join(sorted(BIASES))}")
    empty = partial(torch.empty, device="meta", dtype=torch.float32)

    def bias(name: str, size: int) -> Tensor | None:
        return empty(size) if name in cfg.biases else None

    def layer(name: str, out: int, inp: int) -> Linear:
        return Linear(empty(out, inp), bias(name, out))

    def norm() -> Norm | RMSNorm:
        return RMSNorm(empty(d)) if cfg.norm_type == "rms" else Norm(empty(d), bias("norm", d))

    def head_norm() -> RMSNorm | None:
        return RMSNorm(empty(cfg.head_size)) if cfg.qk_norm else None

    def block() -> Block:
        q, k, v, o = layer("q", n, d), layer("k", kv, d), layer("v", kv, d), layer("o", d, n)
        mlp = MLP(layer("up", m, d), layer("down", d, m), layer("gate", m, d) if cfg.gated_mlp else None)
        second = norm() if cfg.n_norms == 2 else None
        return Block(norm(), Attention(q, k, v, o, head_norm(), head_norm()), second, mlp)

    return GPT(
        Embedding(empty(cfg.vocab_size, d)),
        None if cfg.rotary_dim else Embedding(empty(cfg.n_ctx, d)),
        tuple(block() for _ in range(cfg.n_layer)),
        norm(),
        None if cfg.tie_word_embeddings else layer("head", cfg.vocab_size, d),
        cfg,
    )


def init(cfg: Config, rng: torch.Generator) -> GPT:
    """Random params: weights ~ N(0, 0.02), those of `o` and `down` ~ N(0, 0.02 / sqrt(2 n_layer)), as they write to the
    residual stream; biases 0, norms 1. fp32.

    Args:
        cfg: The shape of the model.
        rng: A key: each leaf is drawn from fold_in(rng, path).

    Raises:
        InputError: if the sizes of `cfg` do not fit one another.

    Source: Radford et al. 2019, section 2.3.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> fgpt.init(cfg, fgpt.key(0)).blocks[0].attn.q.w.shape
    torch.Size([8, 8])
    """
    bare = abstract_params(cfg)

    def fresh(path: str, x: Tensor) -> Tensor:
        if x.ndim == 1:
            return torch.full(x.shape, 0.0 if path.endswith(".b") else 1.0, dtype=torch.float32)
        name = path.removesuffix(".w").replace("blocks.", "").replace("attn.", "").replace("mlp.", "")
        std = 0.02 / (2 * cfg.n_layer) ** 0.5 if name.endswith((".o", ".down")) else 0.02
        return torch.empty(x.shape, dtype=torch.float32).normal_(0, std, generator=fold_in(rng, name))

    return replace_at(bare, {path: fresh(path, x) for path, x in leaves(bare).items()})


def fused_qkv(p: Attention | FusedAttention) -> Linear:
    """q, k and v of one block as one layer.

    Raises:
        InputError: if one of them is adapted or quantized.
    """
    if isinstance(p, FusedAttention):
        return p.qkv
    weights, biases = [x.w for x in (p.q, p.k, p.v)], [x.b for x in (p.q, p.k, p.v) if x.b is not None]
    if not all(isinstance(w, Tensor) for w in weights):
        raise InputError("q, k and v are quantized, sharded or adapted already: fuse the plain base first")
    return Linear(torch.cat(weights), torch.cat(biases) if biases else None)  # pyright: ignore[reportArgumentType]


def fuse_qkv(params: GPT) -> GPT:
    """The same model with q, k and v of every block in one product. A LoRA on `attn.qkv` then shares its A among the
    three, as PEFT's LoRA on GPT-2's c_attn does.

    Raises:
        InputError: if q, k or v of a block is adapted or quantized.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> fgpt.fuse_qkv(fgpt.init(cfg, fgpt.key(0))).blocks[0].attn.qkv.w.shape
    torch.Size([24, 8])
    """
    fused = {
        f"blocks.{i}.attn": FusedAttention(fused_qkv(p.attn), p.attn.o, p.attn.q_norm, p.attn.k_norm)
        for i, p in enumerate(params.blocks)
    }
    return replace_at(params, fused)
