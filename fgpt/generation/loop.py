"""Text from a model: prefill, then decode token by token over a cache."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fgpt.adapter_stacking import stack_adapters, without_dropout
from fgpt.adapters import Adapters
from fgpt.errors import InputError
from fgpt.generation import static_cache
from fgpt.generation.sampling import GREEDY, SamplingParams, sample
from fgpt.generation.static_cache import StaticKVCache
from fgpt.model import GPT
from fgpt.rng import fold_in
from fgpt.tree import device, tree_map


class GenerationOutput(NamedTuple):
    """New tokens of one prompt, without the end token, and whether the model ended by itself."""

    tokens: list[int]
    finished: bool
    logprobs: list[float]
    """ln p of each token, the end token too, under the model itself, before any filter; empty unless asked for."""


class StreamedToken(NamedTuple):
    """What a row was given next; `end` where it is what ends the text, and no part of it."""

    row: int
    token: int
    logprob: float | None
    end: bool


StoppingCriterion = Callable[[list[int]], bool]
"""Whether a text of new tokens is at its end, though the model has not ended it: see `stop_at`."""


@torch.no_grad()
def generate(
    params: GPT,
    prompts: Sequence[Sequence[int]],
    eos_token_id: int | Collection[int],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    rng: torch.Generator | None = None,
    stopping_criterion: StoppingCriterion | None = None,
    logprobs: bool = False,
    adapters: Sequence[Adapters] | None = None,
    compile: bool = False,
) -> list[GenerationOutput]:
    """Continue each of a batch of ragged prompts by at most `most` tokens, until `end`, which may be several tokens, or
    until `until` says so. With -1 no token ends a text.

    Greedy by default. Prompts are padded on the left as a document of their own, and each row draws by a key of its
    own: neighbors change nothing. For several texts of one prompt give it several times; it is read once. `adapters`
    gives each prompt its own. `compiled` compiles the step: see `static_cache.compiled`.

    Raises InputError for an empty prompt, or one with no room in the context for a single new token; and as `stack`
    does for adapters that do not fit one another.
    """
    texts: list[GenerationOutput] = [GenerationOutput([], False, []) for _ in prompts]
    for step in stream(
        params, prompts, eos_token_id, max_new_tokens, sampling, rng, stopping_criterion, logprobs, adapters, compile
    ):
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
    eos_token_id: int | Collection[int],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    rng: torch.Generator | None = None,
    stopping_criterion: StoppingCriterion | None = None,
    logprobs: bool = False,
    adapters: Sequence[Adapters] | None = None,
    compile: bool = False,
) -> Iterator[list[StreamedToken]]:
    """What `generate` gathers, as it comes: at each step the next token of every row that is not at its end.

    Raises InputError as `generate` does, before the first step.
    """
    tokens_left(params, prompts, max_new_tokens)
    context, at, choose, starts = params.cfg.cached_context, device(params), sampling.filter, list(map(len, prompts))
    if sampling.temperature > 0 and rng is None:
        raise InputError("sampling at a temperature above 0 needs a key: rng=fgpt.key(seed)")
    ends_text = eos_ids(eos_token_id, params.cfg.vocab_size)
    if adapters is not None and len(adapters) != len(prompts):
        raise InputError(f"{len(adapters)} sets of adapters for {len(prompts)} prompts: expected one for each")
    keys = [] if rng is None else [fold_in(rng, i) for i in range(len(prompts))]
    step = static_cache.compiled_decode_step() if compile else static_cache.decode_step
    texts, going, written = [list(prompt) for prompt in prompts], list(range(len(prompts))), 0
    # Rows share a room until the widest is full; narrower ones then begin anew, without its padding.
    while written < max_new_tokens and (going := [i for i in going if len(texts[i]) < context]):
        mine = None if adapters is None else stack_adapters([without_dropout(adapters[i]) for i in going])
        seen = left_pad([texts[i] for i in going], -1, at)
        last = min(max_new_tokens, written + context - seen.shape[1])
        scores, kept = prefill_ragged(params, [texts[i] for i in going], at, last - written, mine)
        batch = torch.zeros(len(going), dtype=torch.long, device=at)  # the next token of each row that is computed
        rows = torch.arange(len(going), device=at)  # of them those that are not at their end
        while True:
            written += 1
            rngs = [fold_in(keys[i], written) for i in going] if sampling.temperature > 0 else None
            tokens = sample(choose(scores, seen), rngs)
            yield (told := _step_tokens(going, tokens, scores if logprobs else None, ends_text))
            for row, token, _, ends in told:
                texts[row] += [] if ends else [token]
            open_ = [
                j
                for j, x in enumerate(told)
                if not (x.end or (stopping_criterion and stopping_criterion(texts[x.row][starts[x.row] :])))
            ]
            seen = torch.cat([seen, tokens[:, None]], 1)
            if len(open_) < len(going):
                going, keep = [going[j] for j in open_], torch.tensor(open_, dtype=torch.long, device=at)
                rows, tokens, seen = rows[keep], tokens[keep], seen[keep]
                if not compile:  # what is at its end is computed no more; a compiled step wants its batch as it was
                    kept, batch, mine = static_cache.select_rows(kept, keep), batch[keep], _rows_of(mine, keep)
                    rows = torch.arange(len(going), device=at)
            if written == last or not going:
                break
            batch[rows] = tokens
            scores = step(params, batch, kept, mine)[rows]


def _rows_of(adapters: Adapters | None, rows: Tensor) -> Adapters | None:
    return None if adapters is None else tree_map(lambda x: x[rows], adapters)


def tokens_left(params: GPT, prompts: Sequence[Sequence[int]], most: int) -> int:
    """How many tokens, of `most` wanted, can follow the longest of `prompts`.

    Raises InputError for an empty prompt, one with no room in the context for a single new token, or `most` below 0.
    """
    context = params.cfg.cached_context
    if most < 0:
        raise InputError(f"most is {most}: expected a number of new tokens, 0 or more")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens: expected 1 to {context - 1}, the context less one to write"
            )
    return min(most, context - max(map(len, prompts), default=0))


def eos_ids(end: int | Collection[int], vocab: int) -> frozenset[int]:
    """The tokens that end a text, given one, several, or -1 for none.

    Raises InputError for what is no token of the vocabulary.
    """
    several = frozenset((end,) if isinstance(end, int) else end)
    for token in several:
        if not -1 <= token < vocab:
            raise InputError(f"end token {token}: expected one of the vocabulary's {vocab}, or -1 for none")
    return several - {-1}


def _step_tokens(rows: list[int], tokens: Tensor, scores: Tensor | None, ends: frozenset[int]) -> list[StreamedToken]:
    chosen = tokens.tolist()
    chances: list[float | None] = [None] * len(rows)
    if scores is not None:
        chances = scores.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
    return [StreamedToken(row, t, p, t in ends) for row, t, p in zip(rows, chosen, chances, strict=True)]


def prefill_ragged(
    params: GPT, texts: Sequence[Sequence[int]], at: torch.device, most: int = 0, adapters: Adapters | None = None
) -> tuple[Tensor, StaticKVCache]:
    """`read` of ragged texts. One that is there several times is read once, but for adapters of its own."""
    once = list(dict.fromkeys(map(tuple, texts))) if adapters is None else list(map(tuple, texts))
    tokens, ragged = left_pad(once, 0, at), len(set(map(len, once))) > 1
    segments = left_pad([[1] * len(text) for text in once], 0, at) if ragged else None
    scores, kept = static_cache.prefill(params, tokens, segments, most, adapters)
    if len(once) == len(texts):
        return scores, kept
    rows = torch.tensor([once.index(tuple(text)) for text in texts], device=at)
    return scores[rows], static_cache.select_rows(kept, rows)


def left_pad(rows: Sequence[Sequence[int]], value: int, at: torch.device) -> Tensor:
    """[batch seq] of ragged rows, padded on the left."""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows], device=at)


# ----------------------------------------------------------------------------------------------------------------- text


def stop_on_strings(decode: Callable[[list[int]], str], strings: Sequence[str]) -> StoppingCriterion:
    """True once the text of the new tokens holds one of `strings`; `cut` then takes it off.

    Raises InputError for an empty one, which every text holds.
    """
    if not all(strings):
        raise InputError("a stop string is empty: every text would end at once")
    last = max((len(string.encode()) for string in strings), default=0) + 1  # tokens: each has a byte at least
    return lambda tokens: any(string in decode(tokens[-last:]) for string in strings)


def truncate_at_stop(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first of `strings` in it."""
    return text[: min((text.index(string) for string in strings if string in text), default=len(text))]


def stream_text(
    decode: Callable[[list[int]], str], tokens: Iterable[int], strings: Sequence[str] = ()
) -> Iterator[str]:
    """The text of `tokens`, piece by piece as they come: never a part of a character, nor of a stop string."""
    seen: list[int] = []
    told = ""
    for token in tokens:
        seen.append(token)
        text = decode(seen)
        whole = truncate_at_stop(text, strings)
        if len(whole) == len(text):
            # a character of several tokens shows as U+FFFD until it is whole, and a stop string may be on its way
            whole = text.rstrip("�")
            held = max((n for s in strings for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
            whole = whole[: len(whole) - held]
        if len(whole) > len(told):
            yield whole[len(told) :]
            told = whole
    rest = truncate_at_stop(decode(seen), strings)[len(told) :]
    if rest:
        yield rest
