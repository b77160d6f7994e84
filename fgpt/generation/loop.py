"""Text generation: prefill, then decode token by token over a static KV cache."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.adapter_stacking import stack_adapters, without_dropout
from fgpt.adapter_types import Adapters
from fgpt.errors import InputError
from fgpt.generation import static_cache
from fgpt.generation.cuda_graph import GraphedStep
from fgpt.generation.sampling import GREEDY, SamplingParams, sample
from fgpt.generation.static_cache import StaticKVCache
from fgpt.model import GPT
from fgpt.rng import fold_in
from fgpt.tree import device, tree_map


class GenerationOutput(NamedTuple):
    """What was generated for one prompt.

    Args:
        tokens: The new tokens, without the end-of-sequence token.
        finished: Whether the model produced an end-of-sequence token.
        logprobs: ln p of each new token, the end-of-sequence token included, under the model itself, before any logits
            processor; empty unless `logprobs=True`.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> every_token = range(11)
    >>> fgpt.generate(params, [[1, 2]], eos_token_id=every_token, max_new_tokens=3)[0]
    GenerationOutput(tokens=[], finished=True, logprobs=[])
    """

    tokens: list[int]
    finished: bool
    logprobs: list[float]


class StreamedToken(NamedTuple):
    """The next token of one row of the batch. An end-of-sequence token is not part of the text."""

    row: int
    token: int
    logprob: float | None
    is_eos: bool


StoppingCriterion = Callable[[list[int]], bool]
"""Whether a text, given as its new tokens, ends although the model has not ended it: see `stop_on_strings`."""


@torch.no_grad()
def generate(
    params: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_id: int | Collection[int],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    rng: torch.Generator | Sequence[torch.Generator] | None = None,
    stopping_criterion: StoppingCriterion | None = None,
    logprobs: bool = False,
    adapters: Sequence[Adapters] | None = None,
    compile: bool = False,
) -> list[GenerationOutput]:
    """Continue each prompt of a batch of prompts of different lengths. Greedy by default.

    Prompts are padded on the left with a segment of their own, and each row samples with its own key: the other rows
    of the batch change nothing. For several samples of one prompt repeat it; it is prefilled once.

    Args:
        params: The model, adapted or not.
        prompts: Token ids of each prompt, 1 to n_ctx - 1 of them.
        eos_token_id: The token or tokens that end a text; -1 for none.
        max_new_tokens: Most tokens to add to each prompt.
        sampling: How the next token is chosen.
        rng: A key, needed at a temperature above 0: row i samples with fold_in(key, i). Or the key of each row.
        stopping_criterion: Ends a text before its end-of-sequence token.
        logprobs: Also return the log-probability of each token.
        adapters: One set of adapters for each prompt, in place of those in `params`. Their dropout is ignored.
        compile: Compile the decoding step, see `static_cache.compiled_decode_step`. On CUDA it is a graph in any case.

    Raises:
        InputError: for a prompt that is empty or leaves no room in the context for one new token, a token outside the
            vocabulary, a temperature without `rng`, and adapters that do not fit the prompts or, as `stack_adapters`
            does, one another.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> outputs = fgpt.generate(params, [[1, 2, 3], [4]], eos_token_id=-1, max_new_tokens=5)
    >>> [len(output.tokens) for output in outputs]
    [5, 5]
    """
    outputs = [GenerationOutput([], False, []) for _ in prompts]
    steps = stream(
        params,
        prompts,
        eos_token_id=eos_token_id,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        rng=rng,
        stopping_criterion=stopping_criterion,
        logprobs=logprobs,
        adapters=adapters,
        compile=compile,
    )
    for step in steps:
        for row, token, logprob, is_eos in step:
            if is_eos:
                outputs[row] = outputs[row]._replace(finished=True)
            else:
                outputs[row].tokens.append(token)
            if logprob is not None:
                outputs[row].logprobs.append(logprob)
    return outputs


@torch.no_grad()
def stream(
    params: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_id: int | Collection[int],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    rng: torch.Generator | Sequence[torch.Generator] | None = None,
    stopping_criterion: StoppingCriterion | None = None,
    logprobs: bool = False,
    adapters: Sequence[Adapters] | None = None,
    compile: bool = False,
) -> Iterator[list[StreamedToken]]:
    """`generate`, one decoding step at a time: the next token of every unfinished row.

    Args:
        params: The model, adapted or not.
        prompts: Token ids of each prompt, 1 to n_ctx - 1 of them.
        eos_token_id: The token or tokens that end a text; -1 for none.
        max_new_tokens: Most tokens to add to each prompt.
        sampling: How the next token is chosen.
        rng: A key, needed at a temperature above 0: row i samples with fold_in(key, i). Or the key of each row.
        stopping_criterion: Ends a text before its end-of-sequence token.
        logprobs: Also give the log-probability of each token.
        adapters: One set of adapters for each prompt, in place of those in `params`. Their dropout is ignored.
        compile: Compile the decoding step, see `static_cache.compiled_decode_step`. On CUDA it is a graph in any case.

    Raises:
        InputError: as `generate` does, before the first step.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> steps = fgpt.stream(params, [[1, 2], [3]], eos_token_id=-1, max_new_tokens=4)
    >>> [[token.row for token in step] for step in steps]
    [[0, 1], [0, 1], [0, 1], [0, 1]]
    """
    _check_arguments(params, prompts, max_new_tokens, sampling, rng, adapters)
    eos = eos_token_ids(eos_token_id, params.cfg.vocab_size)
    if isinstance(rng, torch.Generator):
        rng = [fold_in(rng, i) for i in range(len(prompts))]
    keys = None if sampling.temperature == 0 else rng
    decode_step, fixed_batch = _decode_step(device(params), compile)
    process_logits, n_ctx = sampling.logits_processor, params.cfg.cached_context
    texts = [list(prompt) for prompt in prompts]
    rows = list(range(len(prompts)))  # the unfinished ones
    num_new = 0
    while num_new < max_new_tokens:
        # All rows share one cache until the longest of them fills the context; the shorter ones then start again with
        # a fresh prefill, without its padding.
        rows = [row for row in rows if len(texts[row]) < n_ctx]
        if not rows:
            return
        num_steps = min(max_new_tokens - num_new, n_ctx - max(len(texts[row]) for row in rows))
        state = _start(params, rows, texts, num_steps, adapters)
        for remaining in reversed(range(num_steps)):
            num_new += 1
            step_keys = None if keys is None else [fold_in(keys[row], num_new) for row in state.rows]
            tokens = sample(process_logits(state.logits, state.past_tokens), step_keys)
            step = _streamed_tokens(state, tokens, eos, logprobs)
            yield step
            unfinished: list[int] = []
            for j, token in enumerate(step):
                if token.is_eos:
                    continue
                text = texts[token.row]
                text.append(token.token)
                new_tokens = text[len(prompts[token.row]) :]
                if stopping_criterion is None or not stopping_criterion(new_tokens):
                    unfinished.append(j)
            if not unfinished:
                return
            if len(unfinished) < len(step):
                index = torch.tensor(unfinished, device=tokens.device)
                # A copy of the cache costs some steps of a few finished rows: it waits for an eighth of them.
                shrink = not fixed_batch and 8 * len(unfinished) <= 7 * len(state.cache.next_position)
                state, tokens = _select_unfinished(state, index, shrink_cache=shrink), tokens[index]
            if remaining:
                state = _advance(params, state, tokens, decode_step)
        rows = state.rows


def _decode_step(at: torch.device, compile: bool) -> tuple[Callable[..., Tensor], bool]:
    """The decode step for a device, and whether it needs the batch size of its first call, as a compiled and a recorded
    step do: finished rows then stay in the cache.
    """
    step = static_cache.compiled_decode_step() if compile else static_cache.decode_step
    return (GraphedStep(step), True) if at.type == "cuda" else (step, compile)


def _check_arguments(
    params: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingParams,
    rng: torch.Generator | Sequence[torch.Generator] | None,
    adapters: Sequence[Adapters] | None,
) -> None:
    """Raises InputError as `generate` does."""
    tokens_left(params, prompts, max_new_tokens)
    if sampling.temperature > 0 and rng is None:
        raise InputError("sampling at a temperature above 0 needs a key: rng=fgpt.key(seed)")
    if isinstance(rng, Sequence) and len(rng) != len(prompts):
        raise InputError(f"{len(rng)} keys for {len(prompts)} prompts: expected one for each")
    if adapters is not None and len(adapters) != len(prompts):
        raise InputError(f"{len(adapters)} sets of adapters for {len(prompts)} prompts: expected one for each")


# ------------------------------------------------------------------------------------------------------ batch state


@dataclass(frozen=True)
class DecodeState:
    """A batch of unfinished texts, before their next token is chosen. Entry j of every field but the last two is about
    the text of prompt `rows[j]`; the cache and the adapters may hold finished rows too.
    """

    rows: list[int]
    past_tokens: Int[Tensor, "batch past"]
    """Prompt and new tokens, padded on the left with -1."""
    logits: Float[Tensor, "batch vocab"]
    """Of the next token."""
    cache_rows: Int[Tensor, " batch"]
    """Where the text is in the cache."""
    cache: StaticKVCache
    adapters: Adapters | None
    """Stacked, one for each row of the cache."""


def _start(
    params: GPT, rows: list[int], texts: list[list[int]], num_steps: int, adapters: Sequence[Adapters] | None
) -> DecodeState:
    """Prefill the texts of `rows`, with a cache that has room for `num_steps` new tokens."""
    batch, at = [texts[row] for row in rows], device(params)
    stacked = None if adapters is None else stack_adapters([without_dropout(adapters[row]) for row in rows])
    logits, cache = prefill_ragged(params, batch, num_steps, stacked)
    return DecodeState(rows, left_pad(batch, -1, at), logits, torch.arange(len(rows), device=at), cache, stacked)


def _select_unfinished(state: DecodeState, index: Int[Tensor, " batch"], *, shrink_cache: bool) -> DecodeState:
    """The state of the entries at `index` alone."""
    rows = [state.rows[j] for j in index.tolist()]
    cache_rows, cache, adapters = state.cache_rows[index], state.cache, state.adapters
    if shrink_cache:
        cache = static_cache.select_rows(cache, cache_rows)
        adapters = None if adapters is None else tree_map(lambda x: x[cache_rows], adapters)
        cache_rows = torch.arange(len(rows), device=index.device)
    return DecodeState(rows, state.past_tokens[index], state.logits[index], cache_rows, cache, adapters)


def _advance(
    params: GPT, state: DecodeState, tokens: Int[Tensor, " batch"], decode_step: Callable[..., Tensor]
) -> DecodeState:
    """The state after one more token of each text. The cache is updated in place, like `static_cache.decode_step`'s."""
    batch = tokens.new_zeros(len(state.cache.next_position))  # a finished row decodes token 0, and nothing uses it
    batch[state.cache_rows] = tokens
    logits = decode_step(params, batch, state.cache, state.adapters)[state.cache_rows]
    return replace(state, past_tokens=torch.cat([state.past_tokens, tokens[:, None]], 1), logits=logits)


def _streamed_tokens(
    state: DecodeState, tokens: Int[Tensor, " batch"], eos: frozenset[int], logprobs: bool
) -> list[StreamedToken]:
    chosen: list[float | None] = [None] * len(tokens)
    if logprobs:
        chosen = state.logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
    return [
        StreamedToken(row, token, logprob, token in eos)
        for row, token, logprob in zip(state.rows, tokens.tolist(), chosen, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------- prompts


def tokens_left(params: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """How many of `max_new_tokens` fit into the context after the longest of `prompts`.

    Raises InputError for an empty prompt, one that leaves no room in the context for one new token, or a negative
    `max_new_tokens`.
    """
    context = params.cfg.cached_context
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}: expected 0 or more")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens: expected 1 to {context - 1}, the context without one new token"
            )
    return min(max_new_tokens, context - max(map(len, prompts), default=0))


def eos_token_ids(eos_token_id: int | Collection[int], vocab_size: int) -> frozenset[int]:
    """The tokens that end a text, from one token, several, or -1 for none.

    Raises InputError for a token outside the vocabulary.
    """
    tokens = frozenset((eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id)
    for token in tokens:
        if not -1 <= token < vocab_size:
            raise InputError(f"eos_token_id is {token}: expected 0 to {vocab_size - 1}, or -1 for none")
    return tokens - {-1}


def prefill_ragged(
    params: GPT, texts: Sequence[Sequence[int]], max_new_tokens: int = 0, adapters: Adapters | None = None
) -> tuple[Float[Tensor, "batch vocab"], StaticKVCache]:
    """`static_cache.prefill` of texts of different lengths. Equal texts are prefilled once, unless each row has its own
    `adapters`.
    """
    at = device(params)
    unique = [tuple(text) for text in texts]
    if adapters is None:
        unique = list(dict.fromkeys(unique))
    tokens, segments = left_pad(unique, 0, at), None
    if len(set(map(len, unique))) > 1:
        segments = left_pad([[1] * len(text) for text in unique], 0, at)
    logits, cache = static_cache.prefill(params, tokens, segments, max_new_tokens, adapters)
    if len(unique) == len(texts):
        return logits, cache
    rows = torch.tensor([unique.index(tuple(text)) for text in texts], device=at)
    return logits[rows], static_cache.select_rows(cache, rows)


def left_pad(rows: Sequence[Sequence[int]], value: int, at: torch.device) -> Int[Tensor, "batch seq"]:
    """Rows of different lengths as one tensor, padded with `value` on the left."""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows], device=at)


# ------------------------------------------------------------------------------------------------------------- text


def stop_on_strings(decode: Callable[[list[int]], str], strings: Sequence[str]) -> StoppingCriterion:
    """A criterion that ends a text once it contains one of `strings`; `truncate_at_stop` then removes that string.

    Raises InputError for an empty string, which every text contains.
    """
    if not all(strings):
        raise InputError("a stop string is empty: every text would end at once")
    # Each token is one byte at least, so that a stop string is within this many last tokens.
    max_tokens = max((len(string.encode()) for string in strings), default=0) + 1
    return lambda tokens: any(string in decode(tokens[-max_tokens:]) for string in strings)


def truncate_at_stop(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first of `strings` in it."""
    return text[: min((text.index(string) for string in strings if string in text), default=len(text))]


def stream_text(
    decode: Callable[[list[int]], str], tokens: Iterable[int], strings: Sequence[str] = ()
) -> Iterator[str]:
    """The text of tokens, piece by piece as they come: never a part of a character or of a stop string.

    Args:
        decode: From token ids to text, such as a tokenizer's.
        tokens: The token ids of one text, one by one.
        strings: Strings at the first of which the text ends.

    >>> list(stream_text(lambda tokens: bytes(tokens).decode(errors="replace"), "café".encode()))
    ['c', 'a', 'f', 'é']
    """
    past_tokens: list[int] = []
    emitted = 0  # characters
    for token in tokens:
        past_tokens.append(token)
        text = decode(past_tokens)
        complete = truncate_at_stop(text, strings)
        if len(complete) == len(text):
            complete = _complete_part(text, strings)
        if len(complete) > emitted:
            yield complete[emitted:]
            emitted = len(complete)
    rest = truncate_at_stop(decode(past_tokens), strings)[emitted:]
    if rest:
        yield rest


def _complete_part(text: str, strings: Sequence[str]) -> str:
    """`text` without a last character whose tokens are incomplete, which decodes to U+FFFD, and without the beginning
    of a stop string at its end.
    """
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    begun = (n for string in strings for n in range(1, len(string)) if text.endswith(string[:n]))
    return text[: len(text) - max(begun, default=0)]
