"""Reading prompts and writing one token after the other, at shapes that stay the same: what a compiler wants.

    logits, room = read(params, tokens, segments, most)        the prompts, and room for `most` tokens more
    logits       = step(params, tokens, room)                  the next token of each row

With `adapters`, stacked by `fgpt.stack_adapters`, each row is read and written by its own: one product of the base for all rows,
and one of each row's A and B.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import vmap

from fgpt.adapters import Adapters, adapt
from fgpt.model import GPT, KVCache, LayerKV, StaticLayerCache, forward_with_cache, logits, transformer_layers
from fgpt.tree import node, tree_map


@node
class StaticKVCache:
    """A cache with room for the tokens to come, which `step` writes into: the one thing here that changes in place."""

    kv: tuple[LayerKV, ...]
    visible: Bool[Tensor, "*batch room"]
    """Which slots hold what the row's next token sees."""
    next_position: Int[Tensor, "*batch"]
    """Of the row's next token."""
    write_index: Int[Tensor, "1"]
    """The slot that it takes."""


def prefill(
    params: GPT,
    tokens: Int[Tensor, "batch seq"],
    segments: Int[Tensor, "batch seq"] | None,
    most: int,
    adapters: Adapters | None = None,
) -> tuple[Float[Tensor, "batch vocab"], StaticKVCache]:
    """Logits of what follows each row, and the room that holds the rows and has place for `most` tokens more."""
    if adapters is None:
        h, cache = forward_with_cache(params, tokens, KVCache(), segments)
        scores = logits(params, h[:, -1])
    else:

        def one(a: Adapters, tokens: Tensor, segments: Tensor) -> tuple[Tensor, KVCache]:
            own = adapt(params, a)
            h, cache = forward_with_cache(own, tokens, KVCache(), segments)
            return logits(own, h[-1]), cache

        scores, cache = vmap(one)(adapters, tokens, torch.ones_like(tokens) if segments is None else segments)
    past = tokens.shape[1]
    seen = torch.ones_like(tokens, dtype=torch.bool) if segments is None else segments > 0
    kv = tuple((_grow(k, most), _grow(v, most)) for k, v in cache.kv)
    at = torch.tensor([past], device=tokens.device)
    return scores, StaticKVCache(kv, torch.cat([seen, seen.new_zeros(len(seen), most)], -1), seen.sum(-1), at)


def _grow(x: Tensor, most: int) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:-2], most, x.shape[-1])], -2)


def decode_step(
    params: GPT, tokens: Int[Tensor, "batch"], room: StaticKVCache, adapters: Adapters | None = None
) -> Float[Tensor, "batch vocab"]:
    """Logits of what follows `tokens`, the next one of each row, which the room then holds too."""
    if adapters is None:
        scores = _next(params, tokens, room)
    else:

        def one(a: Adapters, token: Tensor, kv: tuple[LayerKV, ...], seen: Tensor, position: Tensor) -> Tensor:
            return _next(adapt(params, a), token, StaticKVCache(kv, seen, position, room.write_index))

        scores = vmap(one)(adapters, tokens, room.kv, room.visible, room.next_position)
    room.next_position.add_(1)
    room.write_index.add_(1)
    return scores


def _next(params: GPT, tokens: Int[Tensor, "*batch"], room: StaticKVCache) -> Float[Tensor, "*batch vocab"]:
    seen = room.visible.index_fill_(-1, room.write_index, True)[..., None, None, :]
    slots = [StaticLayerCache(k, v, room.write_index) for k, v in room.kv]
    h, _ = transformer_layers(params, tokens[..., None], room.next_position[..., None], seen, slots)
    return logits(params, h[..., 0, :])


def select_rows(room: StaticKVCache, rows: Int[Tensor, "some"]) -> StaticKVCache:
    """The room of some of its rows."""
    kv, seen, position = tree_map(lambda x: x[rows], (room.kv, room.visible, room.next_position))
    return StaticKVCache(kv, seen, position, room.write_index)


@functools.cache
def compiled_decode_step() -> Callable[..., Tensor]:
    """`step`, compiled: for a batch size and a model the first call takes half a minute, the later ones, and those of
    later programs, read what it made. Needs a C++ compiler.
    """
    compiling: Any = torch.compile(decode_step)

    def run(params: GPT, tokens: Tensor, room: StaticKVCache, adapters: Adapters | None = None) -> Tensor:
        for x in (room.visible, *(x for kv in room.kv for x in kv)):  # one program for every length of room
            torch._dynamo.maybe_mark_dynamic(x, max(1, x.ndim - 2))
        return compiling(params, tokens, room, adapters)

    return run
