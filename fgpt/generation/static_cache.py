"""A KV cache of fixed size: prefill and decode at constant shapes, which a compiler needs.

    logits, cache = prefill(params, tokens, segments, max_new_tokens)       the prompts
    logits        = decode_step(params, tokens, cache)                      the next token of each row

With `adapters`, stacked by `fgpt.stack_adapters`, each row has its own: one matmul with the base for all rows, and one
with each row's A and B.
"""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import vmap

from fgpt._typing import check_shapes
from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt
from fgpt.kernels.compilation import compile_or_warn
from fgpt.model import GPT, KVCache, LayerKV, StaticLayerCache, forward_with_cache, logits, transformer_layers
from fgpt.tree import node, tree_map


@node
class StaticKVCache:
    """Keys and values of a batch, with room for its new tokens. `decode_step` updates it in place: the only thing in
    the library that does so.
    """

    kv: tuple[LayerKV, ...]
    visible: Bool[Tensor, "*batch slot"]
    """Which slots the row's next token attends to, besides its own."""
    next_position: Int[Tensor, "*batch"]
    """Position of the row's next token."""
    write_index: Int[Tensor, "1"]
    """The slot of the next token."""


def prefill(
    params: GPT,
    tokens: Int[Tensor, "batch seq"],
    segments: Int[Tensor, "batch seq"] | None,
    max_new_tokens: int,
    adapters: Adapters | None = None,
) -> tuple[Float[Tensor, "batch vocab"], StaticKVCache]:
    """Logits of the next token of each row, and the cache of the rows.

    Args:
        params: The model, adapted or not.
        tokens: The prompts, padded on the left.
        segments: 1 for text and 0 for padding; None has no padding.
        max_new_tokens: The tokens that the cache has room for beyond the prompts.
        adapters: A stack of adapters, one for each row; None for `params` alone.
    """
    if adapters is None:
        h, cache = forward_with_cache(params, tokens, KVCache(), segments)
        scores = logits(params, h[:, -1])
    else:

        def prefill_row(row_adapters: Adapters, tokens: Tensor, segments: Tensor) -> tuple[Tensor, KVCache]:
            adapted = adapt(params, row_adapters)
            h, cache = forward_with_cache(adapted, tokens, KVCache(), segments)
            return logits(adapted, h[-1]), cache

        one_segment = torch.ones_like(tokens)
        scores, cache = vmap(prefill_row)(adapters, tokens, one_segment if segments is None else segments)
    visible = torch.ones_like(tokens, dtype=torch.bool) if segments is None else segments > 0
    kv = tuple((_add_slots(k, max_new_tokens), _add_slots(v, max_new_tokens)) for k, v in cache.kv)
    write_index = torch.tensor([tokens.shape[1]], device=tokens.device)
    empty = visible.new_zeros(len(visible), max_new_tokens)
    return scores, StaticKVCache(kv, torch.cat([visible, empty], -1), visible.sum(-1), write_index)


def _add_slots(x: Tensor, count: int) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:-2], count, x.shape[-1])], -2)


@check_shapes
def decode_step(
    params: GPT, tokens: Int[Tensor, "batch"], cache: StaticKVCache, adapters: Adapters | None = None
) -> Float[Tensor, "batch vocab"]:
    """Logits of what follows the next token of each row.

    Args:
        params: The model, as it was for `prefill`.
        tokens: The next token of each row.
        cache: Of `prefill`; keys and values of the tokens are added to it in place.
        adapters: As for `prefill`.
    """
    if adapters is None:
        scores = _decode(params, tokens, cache)
    else:

        def decode_row(
            row_adapters: Adapters, token: Tensor, kv: "tuple[LayerKV, ...]", visible: Tensor, position: Tensor
        ) -> Tensor:
            row_cache = StaticKVCache(kv, visible, position, cache.write_index)
            return _decode(adapt(params, row_adapters), token, row_cache)

        scores = vmap(decode_row)(adapters, tokens, cache.kv, cache.visible, cache.next_position)
    cache.next_position.add_(1)
    cache.write_index.add_(1)
    return scores


def _decode(params: GPT, tokens: Int[Tensor, "*batch"], cache: StaticKVCache) -> Float[Tensor, "*batch vocab"]:
    mask = cache.visible.index_fill_(-1, cache.write_index, True)[..., None, None, :]
    layers = [StaticLayerCache(k, v, cache.write_index) for k, v in cache.kv]
    h, _ = transformer_layers(params, tokens[..., None], cache.next_position[..., None], mask, layers)
    return logits(params, h[..., 0, :])


def select_rows(cache: StaticKVCache, rows: Int[Tensor, " selected"]) -> StaticKVCache:
    """The cache of these rows alone."""
    kv, visible, position = tree_map(lambda x: x[rows], (cache.kv, cache.visible, cache.next_position))
    return StaticKVCache(kv, visible, position, cache.write_index)


@functools.cache
def compiled_decode_step() -> Callable[..., Tensor]:
    """`decode_step`, compiled. The first call for a batch size and a model takes half a minute; later calls, in later
    processes too, use the compiled code from the cache. Needs a C++ compiler; without one, a `CompileWarning` says so.
    """
    compiled = compile_or_warn(decode_step, "the decoding step")

    def run(params: GPT, tokens: Tensor, cache: StaticKVCache, adapters: Adapters | None = None) -> Tensor:
        for x in (cache.visible, *(x for kv in cache.kv for x in kv)):  # one compilation for every number of slots
            torch._dynamo.maybe_mark_dynamic(x, max(1, x.ndim - 2))
        return compiled(params, tokens, cache, adapters)

    return run
