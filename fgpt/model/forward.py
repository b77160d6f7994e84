"""The GPT as pure functions of its params tree:

    x   = wte[tokens] + wpe[positions]
    x   = x + attn(ln_1(x));  x = x + mlp(ln_2(x))      for each block
    out = ln_f(x) headᵀ                                  the head is wte itself if `head` is None

The tree says what is computed: without `wpe` queries and keys are rotated, an MLP with a `gate` multiplies by it, and a
block without `ln_2` has one norm for both its branches. What no leaf can say is in the Config.

Source: Radford et al. 2019 (GPT-2), section 2.3; Wang and Komatsuzaki 2021 (GPT-J); Touvron et al. 2023 (LLaMA),
section 2.2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.errors import InputError
from fgpt.kernels.attention import attention, sliding
from fgpt.kernels.attention import reference as explicit_attention
from fgpt.kernels.documents import Documents
from fgpt.kernels.dropout import uniform_noise
from fgpt.kernels.functorch_state import dual_outside_torch_func
from fgpt.kernels.fused_attention import takes_documents
from fgpt.kernels.grad_only_linear import GradOnly
from fgpt.kernels.norm import layer_norm, rms_norm
from fgpt.kernels.remat import remat as rematerialize
from fgpt.kernels.rotary import DynamicScaling, RopeCosSin, apply_rope, rope_cos_sin
from fgpt.kernels.sharded_parameter import ShardedParameter
from fgpt.model.block_compilation import compile_block
from fgpt.model.cache import KVCache, LayerKV, StaticLayerCache
from fgpt.model.config import Config
from fgpt.model.params import GPT, MLP, Attention, Block, EmbeddingNoise, FusedAttention, Linear, Norm, RMSNorm
from fgpt.model.shared_prompts import SharedPrompts
from fgpt.model.taps import BoundTap, Tap, bind, edit, inside, select_points
from fgpt.tree import replace_at, tree_map
from fgpt.weights import Adapted, Weight, dtype, embed, linear, linear_group


def norm(x: Float[Tensor, "*batch d_model"], p: Norm | RMSNorm, eps: float) -> Float[Tensor, "*batch d_model"]:
    """LayerNorm or RMSNorm: see `fgpt.kernels.norm`."""
    w = p.w.to(x.dtype)
    if isinstance(p, RMSNorm):
        return rms_norm(x, w, eps)
    return layer_norm(x, w, None if p.b is None else p.b.to(x.dtype), eps)


def qkv(
    x: Float[Tensor, "*batch seq d_model"],
    p: Attention | FusedAttention,
    cfg: Config,
    positions: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "*batch head seq d_head"], ...]:
    """Queries, keys and values by head: `cfg.n_head` heads of queries, `cfg.kv_heads` of keys and values. With
    `positions`, other queries than those at these flat positions are 0, and cost nothing if they have a matrix of their
    own.
    """
    if isinstance(p, FusedAttention):
        n, kv = cfg.head_size * cfg.n_head, cfg.head_size * cfg.kv_heads
        flat = linear(x, p.qkv.w, p.qkv.b).split((n, kv, kv), -1)
    else:
        k_and_v = (p.k.w, p.k.b), (p.v.w, p.v.b)
        if positions is None:
            flat = linear_group(x, [(p.q.w, p.q.b), *k_and_v])
        else:
            q = linear(select_positions(x, positions), p.q.w, p.q.b)
            flat = _place_at(q, positions, x.shape[:-1]), *linear_group(x, k_and_v)
    q, k, v = (y.unflatten(-1, (-1, cfg.head_size)).transpose(-3, -2) for y in flat)
    q = q if p.q_norm is None else norm(q, p.q_norm, cfg.norm_eps)
    return q, k if p.k_norm is None else norm(k, p.k_norm, cfg.norm_eps), v


def select_positions(x: Float[Tensor, "*batch seq d"], positions: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """The rows of x at these flat positions."""
    return x.flatten(0, -2).index_select(0, positions)


def _place_at(
    x: Float[Tensor, "n d"], positions: Int[Tensor, " n"], shape: torch.Size
) -> Float[Tensor, "*batch seq d"]:
    """x at these flat positions, 0 at the others: the transpose of `select_positions`."""
    zeros = x.new_zeros(shape.numel(), x.shape[-1])
    return zeros.index_copy(0, positions, x).view(*shape, x.shape[-1])


def attention_layer(
    x: Float[Tensor, "*batch seq d_model"],
    p: Attention | FusedAttention,
    cfg: Config,
    mask: Bool[Tensor, "*batch 1 seq key"] | Documents | None,
    past: LayerKV | StaticLayerCache | None,
    rope: RopeCosSin | None,
    score_scale: float = 1.0,
    positions: Int[Tensor, " n"] | None = None,
    tap: BoundTap | None = None,
) -> tuple[Float[Tensor, "*batch seq d_model"] | Float[Tensor, "n d_model"], LayerKV]:
    """Attention over earlier tokens and x; and the keys and values of both.

    Args:
        x: Hidden states, after the norm.
        p: The layer's weights.
        cfg: The model's config.
        mask: True where a token attends to a key; or the documents of packed rows; None is causal.
        past: Keys and values of earlier tokens; a `StaticLayerCache` is written in place.
        rope: The angles of the tokens' positions; None rotates nothing.
        score_scale: A factor of the scores besides 1 / sqrt(d_head).
        positions: The flat positions whose result is computed, in this order, each once; None computes all.
        tap: Called inside the layer; not with `positions`.
    """
    q, k, v = qkv(x, p, cfg, positions)
    q, k, v = edit(tap, "q", q), edit(tap, "k", k), edit(tap, "v", v)
    q = q if score_scale == 1.0 else q * score_scale
    if rope is not None:
        q, k = apply_rope(q, rope, cfg.interleaved), apply_rope(k, rope, cfg.interleaved)
    if isinstance(past, StaticLayerCache):
        past.k[..., past.write_index, :], past.v[..., past.write_index, :] = k, v
        k, v = past.k, past.v
    elif past is not None:
        k, v = torch.cat([past[0], k], -2), torch.cat([past[1], v], -2)
    if tap is not None and (tap.selects("scores") or tap.selects("weights")):
        y = explicit_attention(q, k, v, mask, tap)
    else:
        y = attention(q, k, v, mask)
    y = edit(tap, "z", y).transpose(-3, -2).flatten(-2)
    y = y if positions is None else select_positions(y, positions)
    return linear(y, p.o.w, p.o.b), (k, v)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * torch.sigmoid(x) if dual_outside_torch_func() else F.silu(x),
    "relu": F.relu,
}
"""The choices of `Config.activation`. torch's backward of silu has no forward mode outside torch.func.

Source: Hendrycks and Gimpel 2016 (GELUs), section 2, for the first four.
"""


def mlp(
    x: Float[Tensor, "*batch d_model"], p: MLP, cfg: Config, tap: BoundTap | None = None
) -> Float[Tensor, "*batch d_model"]:
    """down(act(up(x))), or down(act(gate(x)) ⊙ up(x)) if there is a gate.

    Source: Shazeer 2020 (GLU Variants), equation 6.
    """
    activation = ACTIVATIONS[cfg.activation]
    if p.gate is None:
        inner = activation(linear(x, p.up.w, p.up.b))
    else:
        up, gate = linear_group(x, [(p.up.w, p.up.b), (p.gate.w, p.gate.b)])
        inner = activation(gate) * up
    return linear(edit(tap, "neurons", inner), p.down.w, p.down.b)


def block(
    x: Float[Tensor, "*batch seq d_model"],
    p: Block,
    cfg: Config,
    mask: Bool[Tensor, "*batch 1 seq key"] | Documents | None = None,
    past: LayerKV | StaticLayerCache | None = None,
    rope: RopeCosSin | None = None,
    score_scale: float = 1.0,
    positions: Int[Tensor, " n"] | None = None,
    tap: BoundTap | None = None,
) -> tuple[Float[Tensor, "*batch seq d_model"] | Float[Tensor, "n d_model"], LayerKV]:
    """One transformer block: x with attention and MLP added to it; and the keys and values of `past` and x.

    The arguments after the weights `p` are those of `attention_layer`.
    """
    normed = edit(tap, "ln_1", norm(x, p.ln_1, cfg.norm_eps))
    y, kv = attention_layer(normed, p.attn, cfg, mask, past, rope, score_scale, positions, inside(tap, "attn"))
    if positions is not None:
        x, normed = select_positions(x, positions), select_positions(normed, positions)
    after = x + edit(tap, "attn", y)
    if p.ln_2 is not None:
        normed = edit(tap, "ln_2", norm(x if cfg.parallel_residual else after, p.ln_2, cfg.norm_eps))
    return after + edit(tap, "mlp", mlp(normed, p.mlp, cfg, inside(tap, "mlp"))), kv


def _block_for_gradient(x: Tensor, p: Block, cfg: Config, *args: Any, **options: Any) -> tuple[Tensor, LayerKV]:
    """`block` for its gradient alone: what it adds to x last is not computed, as no gradient reads it."""
    last = {"mlp.down.w": _grad_only(p.mlp.down.w)}
    if cfg.parallel_residual:
        last["attn.o.w"] = _grad_only(p.attn.o.w)
    return block(x, replace_at(p, last), cfg, *args, **options)


def _grad_only(w: Weight) -> Weight:
    """`w` for a product whose value nobody reads. If rows are scaled, their gradient reads it: then `w` itself."""
    if isinstance(w, Adapted):
        return w if w.row is not None else replace(w, base=_grad_only(w.base))
    return w if isinstance(w, GradOnly | ShardedParameter) else GradOnly(w)


def _without_kv(fn: Callable[..., tuple[Tensor, LayerKV]]) -> Callable[..., tuple[Tensor, None]]:
    """A block whose keys and values nobody keeps: those of all layers would be alive until the last one has run."""
    return lambda *args, **options: (fn(*args, **options)[0], None)


rematerialized_block = rematerialize(_without_kv(block), recompute_fn=_without_kv(_block_for_gradient))
"""`block` that saves only its inputs for the backward pass, which computes the rest again."""
rematerialized_block_with_kv = rematerialize(block, recompute_fn=_block_for_gradient)
compiled_block = compile_block(block, "the transformer block")
compiled_rematerialized_block = rematerialize(
    compiled_block, recompute_fn=compile_block(_block_for_gradient, "the recomputed transformer block")
)


def block_variant(remat: bool, compile: bool) -> Callable[..., tuple[Tensor, LayerKV | None]]:
    """`block`, rematerialized or compiled or both, which return no keys and values."""
    if compile:
        return compiled_rematerialized_block if remat else compiled_block
    return rematerialized_block if remat else block


@dataclass(frozen=True)
class BlockFunction:
    """A block of a model, as a function of the residual stream and of weights: see `block_functions`.

    Args:
        params: The model.
        i: Which of its blocks.
        args: What `block` takes after its config: the mask, the angles of rope and others.
    """

    params: GPT
    i: int
    args: tuple[Any, ...]

    def __call__(
        self, x: Float[Tensor, "*batch seq d_model"], p: Block, tap: Tap | None = None
    ) -> Float[Tensor, "*batch seq d_model"]:
        block_tap = inside(bind(tap, self.params), f"blocks.{self.i}")
        return block(x, p, self.params.cfg, *self.args, tap=block_tap)[0]


def transformer_layers(
    params: GPT,
    tokens: Int[Tensor, "*batch seq"],
    positions: Int[Tensor, "*#batch seq"],
    mask: Bool[Tensor, "*batch 1 seq key"] | Documents | None,
    past: Sequence[LayerKV | StaticLayerCache | None],
    *,
    length: int | Int[Tensor, "*batch seq"] = 0,
    block_fn: Callable[..., tuple[Tensor, LayerKV | None]] = block,
    output_positions: Int[Tensor, " n"] | None = None,
    tap: BoundTap | None = None,
) -> tuple[Float[Tensor, "*batch seq d_model"] | Float[Tensor, "n d_model"], tuple[LayerKV, ...]]:
    """Embedding, blocks and ln_f for tokens at the given positions.

    Args:
        params: The model.
        tokens: Token ids.
        positions: The position of each token in its document.
        mask: True where a token attends to a key; or the documents of packed rows; None is causal.
        past: Keys and values of earlier tokens, one for each layer.
        length: The length of each token's document: only a dynamic rope depends on it.
        block_fn: `block`, or a function with the same values that saves less for the backward pass.
        output_positions: The flat positions whose hidden states are returned, in this order: of the last block they
            alone need queries and the MLP. None returns all.
        tap: Called at the points of `fgpt.model.taps`. A block with a point inside it runs as it is, by `block`.

    Returns:
        The hidden states, and the keys and values of each layer, those of `past` included, if `block_fn` returns them.
    """
    cfg = params.cfg
    x = embed(tokens, params.wte.w)
    x = x if params.wte.noise is None else add_noise(x, params.wte.noise)
    x = x if params.wpe is None else x + embed(positions, params.wpe.w)
    x = edit(tap, "embed", x)
    rope = None
    if cfg.rotary_dim:
        rope = rope_cos_sin(positions, cfg.rotary_dim, cfg.rope_theta, cfg.rope_scaling, x.dtype, length)
    windowed = mask if cfg.sliding_window is None else _window_mask(tokens, mask, past, cfg.sliding_window)
    new_kv: list[LayerKV] = []
    for i, (p, layer_past) in enumerate(zip(params.blocks, past, strict=True)):
        layer_mask = mask if i in cfg.full_layers else windowed
        selected = output_positions if i == len(params.blocks) - 1 else None
        block_tap = inside(tap, f"blocks.{i}")
        run_block = block_fn if block_tap is None else partial(block, tap=block_tap)
        x, kv = run_block(x, p, cfg, layer_mask, layer_past, rope, cfg.score_scale(i), selected)
        x = edit(tap, f"blocks.{i}", x)
        if kv is not None:
            new_kv.append(kv)
    return edit(tap, "ln_f", final_norm(params, x)), tuple(new_kv)


def _window_mask(
    tokens: Tensor, mask: Tensor | Documents | None, past: Sequence[LayerKV | StaticLayerCache | None], window: int
) -> Bool[Tensor, "*batch 1 seq key"] | Documents | None:
    """`mask` within a sliding window."""
    if isinstance(mask, Documents):
        return mask  # rows are within the window: see `_takes_documents`
    queries = tokens.shape[-1]
    num_past = past[0][0].shape[-2] if isinstance(past[0], tuple) else 0
    keys = num_past + queries if mask is None else mask.shape[-1]
    windowed = sliding(mask, window, queries, keys, tokens.device)
    return windowed if windowed is None else windowed.expand(*tokens.shape[:-1], 1, queries, keys)


def _takes_documents(params: GPT, tokens: Tensor) -> bool:
    """Whether attention needs no mask for the documents of these rows."""
    cfg = params.cfg
    in_window = cfg.sliding_window is None or tokens.shape[-1] <= cfg.sliding_window
    return in_window and takes_documents(tokens.device, dtype(params.wte.w), cfg.head_size)


def _forward(
    params: GPT,
    tokens: Tensor,
    segments: Tensor | None,
    cache: KVCache,
    block_fn: Callable[..., tuple[Tensor, LayerKV | None]] = block,
    cu_seqlens: Tensor | None = None,
    output_positions: Tensor | None = None,
    tap: BoundTap | None = None,
) -> tuple[Tensor, KVCache]:
    seq, past = tokens.shape[-1], cache.kv[0][0].shape[-2] if cache.kv else 0
    if past + seq > params.cfg.n_ctx:
        raise InputError(
            f"{past + seq} tokens in a row, but the model's context is {params.cfg.n_ctx}: shorten the row"
        )
    length: int | Tensor = past + seq
    if cu_seqlens is not None:
        documents, all_segments = Documents(cu_seqlens), None
        documents.check(tokens)
        positions = documents.positions(seq)
        length = documents.lengths(seq) if isinstance(params.cfg.rope_scaling, DynamicScaling) else 0
        mask = documents if _takes_documents(params, tokens) else documents.mask(seq)
    elif segments is None and cache.segments is None:
        positions, mask, all_segments = torch.arange(past, past + seq, device=tokens.device), None, None
    else:
        new = torch.ones_like(tokens) if segments is None else segments
        earlier = new.new_ones(*new.shape[:-1], past) if cache.segments is None else cache.segments
        all_segments = torch.cat([earlier, new], -1)
        same = new[..., :, None] == all_segments[..., None, :]
        length = same.sum(-1) if isinstance(params.cfg.rope_scaling, DynamicScaling) else 0
        same = same & same.new_ones(seq, past + seq).tril(past)
        positions, mask = same.sum(-1) - 1, same[..., None, :, :]
    layers_past = cache.kv or (None,) * len(params.blocks)
    h, kv = transformer_layers(
        params,
        tokens,
        positions,
        mask,
        layers_past,
        length=length,
        block_fn=block_fn,
        output_positions=output_positions,
        tap=tap,
    )
    return h, KVCache(kv, all_segments)


@check_shapes
def hidden(
    params: GPT,
    tokens: Int[Tensor, "*batch seq"],
    segments: Int[Tensor, "*batch seq"] | None = None,
    remat: bool = False,
    compile: bool = False,
    cu_seqlens: Int[Tensor, "*batch n"] | None = None,
    *,
    tap: Tap | None = None,
) -> Float[Tensor, "*batch seq d_model"]:
    """The last hidden states, after ln_f: the input of a head or a loss.

    Args:
        params: The model, adapted or not.
        tokens: Token ids.
        segments: The document that each token of a packed row belongs to: attention stays inside a document, and its
            positions count from 0. Padding is one more document, commonly 0. None makes each row one document.
        remat: Rematerialization, or activation checkpointing: save only each block's input for the backward pass,
            which runs the block again. The same gradient in less memory and more time.
        compile: Compile the block (needs a C++ compiler): one program serves all layers, every batch size and every
            width, and is kept on disk for later processes. Equal up to rounding. Under transforms of torch.func, and
            where torch cannot compile it, which a warning says, the block runs as it is.
        cu_seqlens: Where each document of a packed row begins and the last one ends, see `Batch`: the meaning of
            `segments`, which it replaces, if no document is interrupted by another. Attention then needs no mask.
        tap: A function of activations, whose results replace them, see `Tap`. Blocks inside which it is called are
            neither rematerialized nor compiled.

    Raises:
        InputError: if a row is longer than the context, and for a tap that selects no point or returns another shape.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> fgpt.hidden(fgpt.init(cfg, fgpt.key(0)), torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 8])
    """
    block_fn = block_variant(remat, compile)
    return _forward(params, tokens, segments, KVCache(), block_fn, cu_seqlens, tap=bind(tap, params))[0]


def block_functions(
    params: GPT,
    tokens: Int[Tensor, "*batch seq"],
    segments: Int[Tensor, "*batch seq"] | None = None,
    *,
    cu_seqlens: Int[Tensor, "*batch n"] | None = None,
) -> tuple[Float[Tensor, "*batch seq d_model"], list[BlockFunction]]:
    """The model of these tokens, block by block: the input of the first block, and each block as a function of the
    residual stream and of its weights, which may be others than `params` has.

        hidden(params, tokens) = final_norm(params, f_n(.. f_1(x) ..))        x, [f_1, .., f_n] = block_functions(..)

    Args:
        params: The model, adapted or not.
        tokens: Token ids.
        segments: As in `hidden`.
        cu_seqlens: As in `hidden`.

    Raises:
        InputError: as `hidden` does.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=2, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params, tokens = fgpt.init(cfg, fgpt.key(0)), torch.tensor([[1, 2, 3]])
    >>> x, functions = block_functions(params, tokens)
    >>> for f, block_params in zip(functions, params.blocks, strict=True):
    ...     x = f(x, block_params)
    >>> torch.equal(fgpt.final_norm(params, x), fgpt.hidden(params, tokens))
    True
    """
    inputs: list[Tensor] = []
    functions: list[BlockFunction] = []

    def record(x: Tensor, p: Block, cfg: Config, *args: Any) -> tuple[Tensor, None]:
        inputs.append(x)
        functions.append(BlockFunction(params, len(functions), args))
        return x, None

    _forward(params, tokens, segments, KVCache(), record, cu_seqlens)
    return inputs[0], functions


@check_shapes
def trace(
    params: GPT,
    tokens: Int[Tensor, "*batch seq"],
    segments: Int[Tensor, "*batch seq"] | None = None,
    *,
    target: str,
    tap: Tap | None = None,
    cu_seqlens: Int[Tensor, "*batch n"] | None = None,
) -> tuple[Float[Tensor, "*batch seq d_model"], dict[str, Tensor]]:
    r"""`hidden`, and activations on the way to it, by the paths of their points.

    Args:
        params: The model, adapted or not.
        tokens: Token ids.
        segments: As in `hidden`.
        target: A regular expression that matches the paths of points in full; `fgpt.model.taps` lists them.
        tap: As in `hidden`: the activations are those that it leaves.
        cu_seqlens: As in `hidden`.

    Raises:
        InputError: as `hidden` does, and if `target` matches no point.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=2, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> h, activations = fgpt.trace(params, torch.tensor([[1, 2, 3]]), target=r"blocks\.\d+(\.attn\.weights)?")
    >>> list(activations)
    ['blocks.0.attn.weights', 'blocks.0', 'blocks.1.attn.weights', 'blocks.1']
    >>> activations["blocks.1.attn.weights"].shape  # [batch head seq key]
    torch.Size([1, 2, 3, 3])
    >>> torch.equal(h, fgpt.final_norm(params, activations["blocks.1"]))
    True
    """
    activations: dict[str, Tensor] = {}
    edits, points = bind(tap, params), select_points(params, target)

    def record(path: str, x: Tensor) -> Tensor:
        x = edit(edits, path, x)
        if path in points:
            activations[path] = x
        return x

    paths = points if edits is None else points | edits.paths
    h, _ = _forward(params, tokens, segments, KVCache(), cu_seqlens=cu_seqlens, tap=BoundTap(record, paths))
    return h, activations


@check_shapes
def hidden_at(
    params: GPT,
    tokens: Int[Tensor, "*batch seq"],
    positions: Int[Tensor, " n"],
    segments: Int[Tensor, "*batch seq"] | None = None,
    remat: bool = False,
    compile: bool = False,
    cu_seqlens: Int[Tensor, "*batch bounds"] | None = None,
) -> Float[Tensor, "n d_model"]:
    """`hidden` at some positions alone: hidden(params, tokens).flatten(0, -2)[positions], for less.

    In the last block the other positions need keys and values, and nothing else: with answers of half the tokens, 3 %
    of the products of 12 layers are saved. That block's activations are incomplete, so there is no tap here.

    Args:
        params: The model, adapted or not.
        tokens: Token ids.
        positions: Indices into the tokens of all rows, one row after the other. The gradient needs distinct ones.
        segments: As in `hidden`.
        remat: As in `hidden`.
        compile: As in `hidden`.
        cu_seqlens: As in `hidden`.

    Raises:
        InputError: if a row is longer than the context.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> fgpt.hidden_at(fgpt.init(cfg, fgpt.key(0)), torch.tensor([[1, 2, 3]]), torch.tensor([2])).shape
    torch.Size([1, 8])
    """
    return _forward(params, tokens, segments, KVCache(), block_variant(remat, compile), cu_seqlens, positions)[0]


def add_noise(x: Float[Tensor, "*batch seq d_model"], noise: EmbeddingNoise) -> Float[Tensor, "*batch seq d_model"]:
    """Embeddings with the noise of training: each row of a batch draws its own."""
    *_, seq, d_model = x.shape
    draws = uniform_noise(noise.seed.to(x.device), x[..., 0].numel(), d_model).view(x.shape)
    return x + (noise.alpha / math.sqrt(seq * d_model) * draws).to(x.dtype)


def lm_head(params: GPT) -> Linear:
    """The output layer: the model's own head, or the embedding table if the two are tied.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> fgpt.lm_head(fgpt.init(cfg, fgpt.key(0))).w.shape
    torch.Size([10, 8])
    """
    return params.head or Linear(params.wte.w)


def final_norm(params: GPT, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    r"""ln_f of the residual stream: the last hidden states. Of an earlier block's stream they give the logit lens.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=2, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> _, activations = fgpt.trace(params, torch.tensor([1, 2, 3]), target=r"blocks\.0")
    >>> fgpt.logits(params, fgpt.final_norm(params, activations["blocks.0"])).shape
    torch.Size([3, 10])
    """
    return norm(x, params.ln_f, params.cfg.norm_eps)


def logits(params: GPT, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """Next-token logits of hidden states: lm_head(h).

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> fgpt.logits(fgpt.init(cfg, fgpt.key(0)), torch.ones(5, 8)).shape
    torch.Size([5, 10])
    """
    head = lm_head(params)
    return linear(h, head.w, head.b)


@check_shapes
def apply(
    params: GPT,
    tokens: Int[Tensor, "*batch seq"],
    segments: Int[Tensor, "*batch seq"] | None = None,
    *,
    tap: Tap | None = None,
) -> Float[Tensor, "*batch seq vocab"]:
    """Next-token logits at every position: logits(hidden(tokens)).

    Args:
        params: The model, adapted or not.
        tokens: Token ids.
        segments: The document that each token of a packed row belongs to, as in `hidden`.
        tap: As in `hidden`.

    Raises:
        InputError: as `hidden` does.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> fgpt.apply(fgpt.init(cfg, fgpt.key(0)), torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 10])
    """
    return logits(params, hidden(params, tokens, segments, tap=tap))


@check_shapes
def forward_with_cache(
    params: GPT,
    tokens: Int[Tensor, "*batch seq"],
    cache: KVCache,
    segments: Int[Tensor, "*batch seq"] | None = None,
    *,
    tap: Tap | None = None,
    positions: Int[Tensor, " n"] | None = None,
    remat: bool = False,
) -> tuple[Float[Tensor, "*batch seq d_model"] | Float[Tensor, "n d_model"], KVCache]:
    """`hidden` of tokens that follow those in `cache`, and the cache that holds them too.

    Prefill and decode are this one function: a text in any number of chunks equals one pass, and so do the gradients.

    Args:
        params: The model, adapted or not.
        tokens: The ids of the next token, or of several.
        cache: What the last call returned, or `KVCache()`. It is not changed.
        segments: As in `hidden`. Prompts of different lengths are padded on the left, with segment 0 for padding and 1
            for text.
        tap: As in `hidden`, for the activations of these tokens; not with `positions`.
        positions: As in `hidden_at`: hidden states are returned at these positions alone. None returns all.
        remat: As in `hidden`.

    Raises:
        InputError: as `hidden` does, and if a row is longer than a dynamic rope allows keys to be cached.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> _, cache = fgpt.forward_with_cache(params, torch.tensor([[1, 2]]), fgpt.KVCache())
    >>> h, cache = fgpt.forward_with_cache(params, torch.tensor([[3]]), cache)
    >>> h.shape, cache.kv[0][0].shape  # keys: [batch, head, position, d_head]
    (torch.Size([1, 1, 8]), torch.Size([1, 2, 3, 4]))
    """
    total = tokens.shape[-1] + (cache.kv[0][0].shape[-2] if cache.kv else 0)
    if params.cfg.cached_context < total <= params.cfg.n_ctx:
        raise InputError(
            f"{total} tokens in a row, but a dynamic rope rotates all keys anew beyond {params.cfg.cached_context}, so "
            "they cannot be cached: shorten the row, or pass it whole to apply or hidden"
        )
    block_fn = rematerialized_block_with_kv if remat else block
    return _forward(params, tokens, segments, cache, block_fn, output_positions=positions, tap=bind(tap, params))


@check_shapes
def read_prompts(params: GPT, prompts: SharedPrompts, remat: bool = False) -> KVCache:
    """The keys and values of prompts, a row for each.

    Args:
        params: The model, adapted or not.
        prompts: What rows continue.
        remat: As in `hidden`.

    Raises:
        InputError: as `forward_with_cache` does.
    """
    one = prompts.tokens.new_zeros(1)  # no hidden state is read, but not every kernel multiplies no rows
    return forward_with_cache(params, prompts.tokens, KVCache(), prompts.segments, positions=one, remat=remat)[1]


@check_shapes
def hidden_after(
    params: GPT,
    cache: KVCache,
    prompt_of_row: Int[Tensor, " rows"],
    tokens: Int[Tensor, "rows seq"],
    positions: Int[Tensor, " n"] | None = None,
    remat: bool = False,
) -> Float[Tensor, "rows seq d_model"] | Float[Tensor, "n d_model"]:
    """`hidden` of rows that continue prompts, for the cost of each prompt once: rows of the same prompt attend to the
    same keys and values. Its gradients are those of whole rows, too.

    Args:
        params: The model, adapted or not.
        cache: The keys and values of the prompts, as `read_prompts` returns them.
        prompt_of_row: Which prompt each row continues.
        tokens: Token ids of the rows without their prompts, padded on the right.
        positions: As in `hidden_at`; None returns the hidden states at all positions of the rows.
        remat: As in `hidden`.

    Raises:
        InputError: as `forward_with_cache` does, for the longest prompt followed by the longest row.

    >>> import fgpt
    >>> cfg = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32)
    >>> params = fgpt.init(cfg, fgpt.key(0))
    >>> from fgpt.model.shared_prompts import pad_prompts
    >>> prompts = pad_prompts([[1, 2, 3]], [0, 0])
    >>> h = hidden_after(params, read_prompts(params, prompts), prompts.prompt_of_row, torch.tensor([[4, 5], [6, 7]]))
    >>> torch.allclose(h[1], fgpt.hidden(params, torch.tensor([1, 2, 3, 6, 7]))[3:], atol=1e-5)
    True
    """
    of_rows = tree_map(lambda x: x.index_select(0, prompt_of_row), cache)
    return forward_with_cache(params, tokens, of_rows, positions=positions, remat=remat)[0]
