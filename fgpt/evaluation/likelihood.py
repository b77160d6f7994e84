"""Log-likelihoods of continuations, and of long texts by a sliding window; perplexity.

    ln p(continuation | context) = Σ ln p(token_i | context, token_1 .. token_i-1)

A log-likelihood depends on its own request alone: batches are padded on the right, where the causal mask separates
padding from text, so that the other requests of a batch change nothing but the last bits of rounding. What several
requests begin with is read once. Nothing is left out silently: tokens that a context lost are counted, and what cannot
be scored is refused.

Several processes share the batches, if they are asked to: batch i is computed by rank i mod N, and every rank gets all
results. The batches are those of one process, and so are the results, to the last bit.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt.distributed import ALONE, World, map_over_ranks
from fgpt.errors import InputError
from fgpt.evaluation.request_batches import Group, Input, Request, request_batches
from fgpt.kernels.cross_entropy import CHUNK_BYTES
from fgpt.kernels.precision import at_least_fp32
from fgpt.model import GPT, Config, KVCache, hidden_after, hidden_at, logits, pad_prompts, read_prompts
from fgpt.tree import device, tree_map


class LogLikelihood(NamedTuple):
    """The log-likelihood of a continuation."""

    logprobs: list[float]
    """ln p of each of its tokens, in nats."""
    greedy: list[bool]
    """Whether each is the likeliest token, which greedy decoding would have chosen."""
    truncated: int = 0
    """Tokens that were removed from the beginning of the context, to fit the model's."""

    @property
    def total(self) -> float:
        """ln p of the whole continuation."""
        return math.fsum(self.logprobs)


def loglikelihood(
    params: GPT, requests: Sequence[Request], *, batch_size: int = 8, world: World = ALONE
) -> list[LogLikelihood]:
    """The log-likelihood of each request's continuation, in the order of the requests.

    If a request is longer than the model's context, its own context loses tokens at the beginning, which `truncated`
    counts; a continuation is never shortened. (Its last token is only predicted, so it needs no room.)

    Args:
        params: The model.
        requests: Pairs of token ids (context, continuation).
        batch_size: Requests in one forward pass.
        world: The processes that share the batches, `fgpt.world()`: all of them call it with equal arguments, and get
            all results.

    Raises:
        InputError: for an empty context, a continuation that is empty or longer than the model's context
            (`loglikelihood_rolling` scores long texts), and a log-likelihood that is not finite.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> [result] = loglikelihood(fgpt.init(config, fgpt.key(0)), [([1, 2], [3, 4, 5])])
    >>> len(result.logprobs), result.truncated
    (3, 0)
    """
    results: dict[int, LogLikelihood] = {}
    for batch in iter_loglikelihood(params, requests, batch_size=batch_size, world=world):
        results.update(batch)
    return [results[i] for i in range(len(requests))]


def iter_loglikelihood(
    params: GPT, requests: Sequence[Request], *, batch_size: int = 8, world: World = ALONE
) -> Iterator[list[tuple[int, LogLikelihood]]]:
    """`loglikelihood`, one batch at a time: the indices of requests and their log-likelihoods.

    The longest come first, so that a lack of memory shows at once, and a batch has texts of similar length. Requests
    of which one's model input begins another's share one row: one-token choices after one context, and the turns of one
    conversation. Choices of several tokens after one context are rows that share it: it is read once, and so are the
    examples before several questions.

    Args:
        params: The model.
        requests: Pairs of token ids (context, continuation).
        batch_size: Requests in one forward pass.
        world: The processes that share the batches: see `loglikelihood`. All of them read the same number of batches.

    Raises:
        InputError: as `loglikelihood` does, for lengths before anything is computed.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: expected 1 or more")
    batches = request_batches(requests, batch_size, params.cfg)

    @functools.lru_cache(maxsize=1)  # one beginning may serve several batches, one after the other
    @torch.no_grad()
    def read(beginnings: tuple[Input, ...]) -> KVCache:
        prompts = pad_prompts(beginnings, range(len(beginnings)))
        return read_prompts(params, tree_map(lambda x: x.to(device(params)), prompts))

    def score(batch: Sequence[Group]) -> list[tuple[int, LogLikelihood]]:
        return _score_batch(params, requests, batch, read)

    return map_over_ranks(score, batches, world)


@torch.no_grad()
def _score_batch(
    params: GPT,
    requests: Sequence[Request],
    batch: Sequence[Group],
    read: Callable[[tuple[Input, ...]], KVCache],
) -> list[tuple[int, LogLikelihood]]:
    """The log-likelihoods of the requests of a batch. `read` gives the keys and values of beginnings."""
    at, width = device(params), max(group.longest_end for group in batch)
    rows = [(row, group.shared) for group in batch for row in group.rows]
    padded = np.zeros((len(rows), width), np.int64)
    indices: list[int] = []
    positions: list[int] = []  # flat
    targets: list[int] = []
    for number, (row, shared) in enumerate(rows):
        padded[number, : len(row.tokens) - shared] = row.tokens[shared:]
        for i, length in row.served:
            end, continuation = number * width + length - shared, requests[i][1]
            indices.append(i)
            positions += range(end - len(continuation), end)
            targets += continuation
    tokens, where = torch.from_numpy(padded).to(at), torch.tensor(positions, device=at)
    if batch[0].shared:
        cache = read(tuple(group.rows[0].tokens[: group.shared] for group in batch))
        group_of_row = [number for number, group in enumerate(batch) for _ in group.rows]
        h = hidden_after(params, cache, torch.tensor(group_of_row, device=at), tokens, where)
    else:
        h = hidden_at(params, tokens, where)
    logprobs, greedy = _token_logprobs(params, h, torch.tensor(targets, device=at))
    results: list[tuple[int, LogLikelihood]] = []
    start = 0
    for i in indices:
        context, continuation = requests[i]
        end = start + len(continuation)
        if not all(map(math.isfinite, logprobs[start:end])):
            raise InputError(f"the log-likelihood of request {i} is not finite: the model diverged, train it again")
        truncated = max(0, len(context) + len(continuation) - 1 - params.cfg.n_ctx)
        results.append((i, LogLikelihood(logprobs[start:end], greedy[start:end], truncated)))
        start = end
    return results


def _token_logprobs(
    params: GPT, h: Float[Tensor, "n d_model"], targets: Int[Tensor, " n"]
) -> tuple[list[float], list[bool]]:
    """ln p of each target after its hidden state, in fp32, and whether it is the likeliest; logits chunk by chunk."""
    logprobs: list[float] = []
    greedy: list[bool] = []
    size = max(1, CHUNK_BYTES // (4 * params.cfg.vocab_size))
    for states, tokens in zip(h.split(size), targets.split(size)):
        scores: Float[Tensor, "chunk vocab"] = at_least_fp32(logits(params, states))
        is_best: Bool[Tensor, " chunk"] = scores.argmax(-1) == tokens
        logprobs += (-F.cross_entropy(scores, tokens, reduction="none")).tolist()
        greedy += is_best.tolist()
    return logprobs, greedy


# ----------------------------------------------------------------------------------------------------------- long texts


def windows(tokens: Sequence[int], bos_token_id: int, *, width: int, stride: int) -> list[Request]:
    """A text as requests that score each of its tokens once.

    The model input of each window is `width` tokens. The first window begins with `bos_token_id` and scores `width`
    tokens. Each later one scores the next `stride` tokens, or what is left, and each of them follows
    width - stride + 1 or more others. With stride = width each token is in one window, which is cheapest, and the first
    token of a window has a context of one token. Perplexities of different strides or widths are not comparable.

    Args:
        tokens: The text's token ids.
        bos_token_id: The token before the text.
        width: Tokens of a window.
        stride: New tokens of each window after the first.

    Raises:
        InputError: unless 1 <= stride <= width.

    >>> windows([5, 6, 7], 0, width=2, stride=1)
    [([0], [5, 6]), ([5, 6], [7])]
    """
    if not 1 <= stride <= width:
        raise InputError(f"a window of {width} tokens and a stride of {stride}: expected 1 <= stride <= width")
    text = [bos_token_id, *tokens]
    requests: list[Request] = []
    done = 0
    while done < len(tokens):
        end = min(done + (stride if done else width), len(tokens))  # tokens[:end] are text[1 : end + 1]
        requests.append((text[max(0, end - width) : done + 1], text[done + 1 : end + 1]))
        done = end
    return requests


def window_and_stride(cfg: Config, width: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """Width and stride of the sliding window, with their defaults.

    Args:
        cfg: The model's config.
        width: Tokens of a window; None takes the model's context, 2,048 at most.
        stride: New tokens of each window after the first; None takes half of the width.

    Raises:
        InputError: for a window wider than the context, and unless 1 <= stride <= width.
    """
    width = min(cfg.n_ctx, 2048) if width is None else width
    stride = max(1, width // 2) if stride is None else stride
    if width > cfg.n_ctx:
        raise InputError(f"a window of {width} tokens is wider than the model's context of {cfg.n_ctx}: narrow it")
    windows([], 0, width=width, stride=stride)
    return width, stride


def loglikelihood_rolling(
    params: GPT,
    tokens: Sequence[int],
    *,
    bos_token_id: int,
    width: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> LogLikelihood:
    """The log-likelihood of a text of any length by a sliding window, each token scored once.

    Args:
        params: The model.
        tokens: The text's token ids.
        bos_token_id: The token before the text.
        width, stride: Of the window, in tokens: see `windows`, and `window_and_stride` for the defaults.
        batch_size: Windows in one forward pass.

    Raises:
        InputError: as `windows`, `window_and_stride` and `loglikelihood` do.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> text = [1, 2, 3] * 10
    >>> len(loglikelihood_rolling(fgpt.init(config, fgpt.key(0)), text, bos_token_id=0).logprobs)
    30
    """
    width, stride = window_and_stride(params.cfg, width, stride)
    requests = windows(tokens, bos_token_id, width=width, stride=stride)
    logprobs: list[float] = []
    greedy: list[bool] = []
    for part in loglikelihood(params, requests, batch_size=batch_size):
        logprobs += part.logprobs
        greedy += part.greedy
    return LogLikelihood(logprobs, greedy)


# ----------------------------------------------------------------------------------------------------------- perplexity


class Perplexity(NamedTuple):
    """The log-likelihood of a text, by its tokens, bytes and words. Only tokens depend on the model's tokenizer."""

    nats: float
    """-ln p of the whole text."""
    tokens: int
    bytes: int
    words: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def per_token(self) -> float:
        """exp(nats / tokens), comparable only between models of one tokenizer."""
        return _exp(self.nats, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def per_byte(self) -> float:
        return _exp(self.nats, self.bytes)

    @property
    def per_word(self) -> float:
        return _exp(self.nats, self.words)


def perplexity(logprobs: Sequence[float], text: str) -> Perplexity:
    """The perplexities of `text`, whose tokens have these log-probabilities.

    Bytes are those of UTF-8, words are separated by white space, both counted in `text`. If the model reads a corpus in
    another form, `text` is the form to count: for WikiText the raw one, with its spaced punctuation, although a model
    may read it detokenized. WikiText's published word perplexities count the ends of lines too:
    `perplexity(..)._replace(words=245_569)` is for the test part of WikiText-2.

    Raises:
        InputError: for an empty text.

    >>> round(perplexity([-1.0, -1.0], "two words").per_token, 3)
    2.718
    """
    if not logprobs or not text:
        raise InputError(f"{len(logprobs)} tokens of a text of {len(text)} characters: expected 1 or more of each")
    return Perplexity(-math.fsum(logprobs), len(logprobs), len(text.encode("utf-8", "replace")), len(text.split()))


def _exp(nats: float, count: int) -> float:
    try:
        return math.exp(nats / count)
    except (OverflowError, ZeroDivisionError):
        return math.inf
