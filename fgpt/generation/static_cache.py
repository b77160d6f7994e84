"""Reading prompts and writing one token after the other, at shapes that stay the same: what a compiler wants.

    logits, room = read(params, tokens, segments, most)        the prompts, and room for `most` tokens more
    logits       = step(params, tokens, room)                  the next token of each row

With `adapters`, stacked by `fgpt.stack`, each row is read and written by its own: one product of the base for all rows,
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
from fgpt.model import GPT, KV, Cache, Slots, extend, logits, through
from fgpt.tree import node, tree_map


@node
class Room:
    """A cache with room for the tokens to come, which `step` writes into: the one thing here that changes in place."""

    kv: tuple[KV, ...]
    seen: Bool[Tensor, "*batch room"]
    """Which slots hold what the row's next token sees."""
    position: Int[Tensor, "*batch"]
    """Of the row's next token."""
    at: Int[Tensor, "1"]
    """The slot that it takes."""


def read(
    params: GPT,
    tokens: Int[Tensor, "batch seq"],
    segments: Int[Tensor, "batch seq"] | None,
    most: int,
    adapters: Adapters | None = None,
) -> tuple[Float[Tensor, "batch vocab"], Room]:
    """Logits of what follows each row, and the room that holds the rows and has place for `most` tokens more."""
    if adapters is None:
        h, cache = extend(params, tokens, Cache(), segments)
        scores = logits(params, h[:, -1])
    else:

        def one(a: Adapters, tokens: Tensor, segments: Tensor) -> tuple[Tensor, Cache]:
            own = adapt(params, a)
            h, cache = extend(own, tokens, Cache(), segments)
            return logits(own, h[-1]), cache

        scores, cache = vmap(one)(adapters, tokens, torch.ones_like(tokens) if segments is None else segments)
    past = tokens.shape[1]
    seen = torch.ones_like(tokens, dtype=torch.bool) if segments is None else segments > 0
    kv = tuple((_wider(k, most), _wider(v, most)) for k, v in cache.kv)
    at = torch.tensor([past], device=tokens.device)
    return scores, Room(kv, torch.cat([seen, seen.new_zeros(len(seen), most)], -1), seen.sum(-1), at)


def _wider(x: Tensor, most: int) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:-2], most, x.shape[-1])], -2)


def step(
    params: GPT, tokens: Int[Tensor, "batch"], room: Room, adapters: Adapters | None = None
) -> Float[Tensor, "batch vocab"]:
    """Logits of what follows `tokens`, the next one of each row, which the room then holds too."""
    if adapters is None:
        scores = _next(params, tokens, room)
    else:

        def one(a: Adapters, token: Tensor, kv: tuple[KV, ...], seen: Tensor, position: Tensor) -> Tensor:
            return _next(adapt(params, a), token, Room(kv, seen, position, room.at))

        scores = vmap(one)(adapters, tokens, room.kv, room.seen, room.position)
    room.position.add_(1)
    room.at.add_(1)
    return scores


def _next(params: GPT, tokens: Int[Tensor, "*batch"], room: Room) -> Float[Tensor, "*batch vocab"]:
    seen = room.seen.index_fill_(-1, room.at, True)[..., None, None, :]
    slots = [Slots(k, v, room.at) for k, v in room.kv]
    h, _ = through(params, tokens[..., None], room.position[..., None], seen, slots)
    return logits(params, h[..., 0, :])


def rows_of(room: Room, rows: Int[Tensor, "some"]) -> Room:
    """The room of some of its rows."""
    kv, seen, position = tree_map(lambda x: x[rows], (room.kv, room.seen, room.position))
    return Room(kv, seen, position, room.at)


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """`step`, compiled: for a batch size and a model the first call takes half a minute, the later ones, and those of
    later programs, read what it made. Needs a C++ compiler.
    """
    compiling: Any = torch.compile(step)

    def run(params: GPT, tokens: Tensor, room: Room, adapters: Adapters | None = None) -> Tensor:
        for x in (room.seen, *(x for kv in room.kv for x in kv)):  # one program for every length of room
            torch._dynamo.maybe_mark_dynamic(x, max(1, x.ndim - 2))
        return compiling(params, tokens, room, adapters)

    return run
