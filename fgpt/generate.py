"""Text from a model: prefill, then decode token by token over a cache."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fgpt.errors import InputError
from fgpt.model import GPT, Cache, extend, logits
from fgpt.rng import fold_in
from fgpt.sampling import GREEDY, Sampling, draw
from fgpt.tree import device, tree_map


class Generated(NamedTuple):
    """New tokens of one prompt, without the end token, and whether the model ended by itself."""

    tokens: list[int]
    finished: bool
    logprobs: list[float]
    """ln p of each token, the end token too, under the model itself, before any filter; empty unless asked for."""


class Token(NamedTuple):
    """What a row was given next; `end` where it is what ends the text, and no part of it."""

    row: int
    token: int
    logprob: float | None
    end: bool


Until = Callable[[list[int]], bool]
"""Whether a text of new tokens is at its end, though the model has not ended it: see `stop_at`."""


@torch.no_grad()
def generate(
    params: GPT,
    prompts: Sequence[Sequence[int]],
    end: int,
    most: int,
    sampling: Sampling = GREEDY,
    rng: torch.Generator | None = None,
    until: Until | None = None,
    logprobs: bool = False,
) -> list[Generated]:
    """Continue each of a batch of ragged prompts by at most `most` tokens, until `end`, or until `until` says so.

    Greedy by default. Prompts are padded on the left as a document of their own, and each row draws by a key of its
    own: neighbours change nothing. For several texts of one prompt give it several times; it is read once.

    Raises InputError for an empty prompt, or one with no room in the context for a single new token.
    """
    texts: list[Generated] = [Generated([], False, []) for _ in prompts]
    for step in stream(params, prompts, end, most, sampling, rng, until, logprobs):
        for row, token, logprob, ends in step:
            if ends:
                texts[row] = texts[row]._replace(finished=True)
            else:
                texts[row].tokens.append(token)
            if logprob is not None:
                texts[row].logprobs.append(logprob)
    return texts


@torch.no_grad()
def stream(
    params: GPT,
    prompts: Sequence[Sequence[int]],
    end: int,
    most: int,
    sampling: Sampling = GREEDY,
    rng: torch.Generator | None = None,
    until: Until | None = None,
    logprobs: bool = False,
) -> Iterator[list[Token]]:
    """What `generate` gathers, as it comes: at each step the next token of every row that is not at its end.

    Raises InputError as `generate` does, before the first step.
    """
    room(params, prompts)
    context, at, choose, starts = params.cfg.context, device(params), sampling.filter, list(map(len, prompts))
    if sampling.temperature > 0 and rng is None:
        raise InputError("sampling at a temperature above 0 needs a key: rng=fgpt.key(seed)")
    keys = [] if rng is None else [fold_in(rng, i) for i in range(len(prompts))]
    texts, going, written = [list(prompt) for prompt in prompts], list(range(len(prompts))), 0
    # Rows share a cache until the widest is full; narrower ones then begin anew, without its padding.
    while written < most and (going := [i for i in going if len(texts[i]) < context]):
        seen = padded([texts[i] for i in going], -1, at)
        last = min(most, written + context - seen.shape[1])
        h, cache = prefill(params, [texts[i] for i in going], at)
        while True:
            written += 1
            scores = logits(params, h[:, -1])
            rngs = [fold_in(keys[i], written) for i in going] if sampling.temperature > 0 else None
            tokens = draw(choose(scores, seen), rngs)
            yield (step := _told(going, tokens, scores if logprobs else None, end))
            for row, token, _, ends in step:
                texts[row] += [] if ends else [token]
            keep = [j for j, x in enumerate(step) if not (x.end or (until and until(texts[x.row][starts[x.row] :])))]
            seen = torch.cat([seen, tokens[:, None]], 1)
            if len(keep) < len(going):  # what is at its end is computed no more
                going, rows = [going[j] for j in keep], torch.tensor(keep, dtype=torch.long, device=at)
                tokens, seen, cache = tokens[rows], seen[rows], tree_map(lambda x, rows=rows: x[rows], cache)
            if written == last or not going:
                break
            h, cache = extend(params, tokens[:, None], cache)


def room(params: GPT, prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens can follow the longest of `prompts`.

    Raises InputError for an empty prompt, or one with no room in the context for a single new token.
    """
    context = params.cfg.context
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens: expected 1 to {context - 1}, the context less one to write"
            )
    return context - max(map(len, prompts), default=0)


def _told(rows: list[int], tokens: Tensor, scores: Tensor | None, end: int) -> list[Token]:
    chosen = tokens.tolist()
    chances: list[float | None] = [None] * len(rows)
    if scores is not None:
        chances = scores.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
    return [Token(row, t, p, t == end) for row, t, p in zip(rows, chosen, chances, strict=True)]


def prefill(params: GPT, texts: Sequence[Sequence[int]], at: torch.device) -> tuple[Tensor, Cache]:
    """`extend` of ragged texts from the beginning; a text that is there several times is read once."""
    once = list(dict.fromkeys(map(tuple, texts)))
    tokens, ragged = padded(once, 0, at), len(set(map(len, once))) > 1
    segments = padded([[1] * len(text) for text in once], 0, at) if ragged else None
    h, cache = extend(params, tokens, Cache(), segments)
    if len(once) == len(texts):
        return h[:, -1:], cache
    rows = torch.tensor([once.index(tuple(text)) for text in texts], device=at)
    return h[rows, -1:], tree_map(lambda x: x[rows], cache)


def padded(rows: Sequence[Sequence[int]], value: int, at: torch.device) -> Tensor:
    """[batch seq] of ragged rows, padded on the left."""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows], device=at)


# ----------------------------------------------------------------------------------------------------------------- text


def stop_at(decode: Callable[[list[int]], str], strings: Sequence[str]) -> Until:
    """True once the text of the new tokens holds one of `strings`; `cut` then takes it off.

    Raises InputError for an empty one, which every text holds.
    """
    if not all(strings):
        raise InputError("a stop string is empty: every text would end at once")
    last = max((len(string.encode()) for string in strings), default=0) + 1  # tokens: each has a byte at least
    return lambda tokens: any(string in decode(tokens[-last:]) for string in strings)


def cut(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first of `strings` in it."""
    return text[: min((text.index(string) for string in strings if string in text), default=len(text))]


def pieces(decode: Callable[[list[int]], str], tokens: Iterable[int], strings: Sequence[str] = ()) -> Iterator[str]:
    """The text of `tokens`, piece by piece as they come: never a part of a character, nor of a stop string."""
    seen: list[int] = []
    told = ""
    for token in tokens:
        seen.append(token)
        text = decode(seen)
        whole = cut(text, strings)
        if len(whole) == len(text):
            # a character of several tokens shows as U+FFFD until it is whole, and a stop string may be on its way
            whole = text.rstrip("�")
            held = max((n for s in strings for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
            whole = whole[: len(whole) - held]
        if len(whole) > len(told):
            yield whole[len(told) :]
            told = whole
    rest = cut(decode(seen), strings)[len(told) :]
    if rest:
        yield rest
