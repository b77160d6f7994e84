"""How well a model tells a text: the log-likelihood of continuations, and of long texts through a sliding window.

    ln p(continuation | context) = Σ ln p(token_i | context, token_1 .. token_i-1)

A score is its pair's alone: rows are padded on the right, where the causal mask keeps the padding from the text, and so
neighbors, their order and their number change nothing but the last bits of rounding. Nothing is left out in silence:
what a context had no room for is counted, and what cannot be scored is refused.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.cross_entropy import CHUNK_BYTES
from fgpt.kernels.precision import at_least_fp32
from fgpt.model import GPT, Config, hidden, logits
from fgpt.tree import device

Request: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""(context, continuation): what is given, one token at least, and what is scored after it."""


class LogLikelihood(NamedTuple):
    """What a model says of a continuation."""

    logprobs: list[float]
    """ln p of each of its tokens, in nats."""
    greedy: list[bool]
    """Whether each is the likeliest, which greedy decoding would have written."""
    truncated: int = 0
    """Tokens that the context lost at its beginning, for want of room."""

    @property
    def total(self) -> float:
        """ln p of the whole continuation."""
        return math.fsum(self.logprobs)


def loglikelihood(params: GPT, pairs: Sequence[Request], batch_size: int = 8) -> list[LogLikelihood]:
    """The score of each pair, in their order, `rows` of them read at once.

    The model reads context and continuation but for its last token. Where these are more than its context has room for,
    the pair's context loses tokens at its beginning, and `cut` says how many; a continuation is always whole.

    Raises InputError for an empty context, a continuation that is empty or longer than the model's context (`rolling`
    scores long texts), and where a probability is not a number.
    """
    found = {i: scored for some in iter_loglikelihood(params, pairs, batch_size) for i, scored in some}
    return [found[i] for i in range(len(pairs))]


@torch.no_grad()
def iter_loglikelihood(
    params: GPT, pairs: Sequence[Request], batch_size: int = 8
) -> Iterator[list[tuple[int, LogLikelihood]]]:
    """What `score` gathers, as it comes: numbers of pairs and their scores.

    The longest come first, so that memory, if it is short, is so at once; rows read together are of like length. What
    the model reads for several pairs, as it does for choices of one token, it reads once.

    Raises InputError as `score` does, before anything is computed where the lengths tell.
    """
    if batch_size < 1:
        raise InputError(f"rows is {batch_size}: expected 1 or more to be read at once")
    context, at = params.cfg.n_ctx, device(params)
    askers: dict[tuple[int, ...], list[int]] = {}
    for i, (given, asked) in enumerate(pairs):
        if not given or not 0 < len(asked) <= context:
            raise InputError(
                f"pair {i} has {len(given)} tokens of context and {len(asked)} to score: expected 1 or more of context "
                f"(the token that begins texts, if nothing else), and 1 to {context} to score, the model's context"
            )
        askers.setdefault((*given, *asked)[:-1][-context:], []).append(i)
    texts = sorted(askers, key=len, reverse=True)
    for some in (texts[i : i + batch_size] for i in range(0, len(texts), batch_size)):
        width = len(some[0])
        h = hidden(params, torch.tensor([[*text] + [0] * (width - len(text)) for text in some], device=at))
        asked = [(i, row * width + len(text)) for row, text in enumerate(some) for i in askers[text]]
        where = [end - n for i, end in asked for n in range(len(pairs[i][1]), 0, -1)]
        y = torch.tensor([token for i, _ in asked for token in pairs[i][1]], device=at)
        logprobs, greedy = _told(params, h.flatten(0, -2)[torch.tensor(where, device=at)], y)
        scores: list[tuple[int, LogLikelihood]] = []
        start = 0
        for i, _ in asked:
            (given, wanted), end = pairs[i], start + len(pairs[i][1])
            if not all(map(math.isfinite, logprobs[start:end])):
                raise InputError(f"pair {i} has a log-likelihood that is no number: the model diverged, train it again")
            cut = max(0, len(given) + len(wanted) - 1 - context)
            scores.append((i, LogLikelihood(logprobs[start:end], greedy[start:end], cut)))
            start = end
        yield scores


def _told(params: GPT, h: Float[Tensor, "n d_model"], y: Int[Tensor, " n"]) -> tuple[list[float], list[bool]]:
    """ln p of tokens y after states h, in fp32, and whether each is the likeliest; a chunk of logits at a time."""
    logprobs: list[float] = []
    greedy: list[bool] = []
    size = max(1, CHUNK_BYTES // (4 * params.cfg.vocab_size))
    for states, targets in zip(h.split(size), y.split(size)):
        scores: Float[Tensor, "chunk vocab"] = at_least_fp32(logits(params, states))
        best: Bool[Tensor, " chunk"] = scores.argmax(-1) == targets
        logprobs += (-F.cross_entropy(scores, targets, reduction="none")).tolist()
        greedy += best.tolist()
    return logprobs, greedy


# ----------------------------------------------------------------------------------------------------------- long texts


def windows(tokens: Sequence[int], begin: int, width: int, stride: int) -> list[Request]:
    """A text as pairs in which each token is scored once: each pair's model input is `width` tokens, the last of which
    are `stride` new ones.

    The first window follows the token `begin` and scores `width` tokens. Each later one scores `stride` more, or what
    is left, and every token of it follows width - stride + 1 others or more. With stride = width each token is read
    once, which is cheapest, and the first of a window has one token to go by. Perplexities of different strides or
    widths do not compare.

    Raises InputError unless 1 <= stride <= width.
    """
    if not 1 <= stride <= width:
        raise InputError(f"a window of {width} tokens and a stride of {stride}: expected 1 <= stride <= width")
    text, pairs, done = [begin, *tokens], [], 0
    while done < len(tokens):
        end = min(done + (stride if done else width), len(tokens))  # tokens[:end] are text[1 : end + 1]
        pairs.append((text[max(0, end - width) : done + 1], text[done + 1 : end + 1]))
        done = end
    return pairs


def window_and_stride(cfg: Config, width: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """Width and stride of a model's window: its context, but 2,048 at most, and half of that, unless they are given.

    Raises InputError for a window wider than the context, and unless 1 <= stride <= width.
    """
    width = min(cfg.n_ctx, 2048) if width is None else width
    stride = max(1, width // 2) if stride is None else stride
    if width > cfg.n_ctx:
        raise InputError(f"a window of {width} tokens is wider than the model's context of {cfg.n_ctx}: narrow it")
    windows([], 0, width, stride)
    return width, stride


def loglikelihood_rolling(
    params: GPT,
    tokens: Sequence[int],
    begin: int,
    width: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> LogLikelihood:
    """The score of a text of any length, each token once: see `windows`, and `room` for what is not given.

    Raises InputError as they do.
    """
    parts = loglikelihood(params, windows(tokens, begin, *window_and_stride(params.cfg, width, stride)), batch_size)
    return LogLikelihood([x for part in parts for x in part.logprobs], [x for part in parts for x in part.greedy])


# ----------------------------------------------------------------------------------------------------------- perplexity


class Perplexity(NamedTuple):
    """The log-likelihood of a text by its tokens, bytes and words: of those, only tokens are the model's own."""

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
        """exp(nats / tokens): of use between models of one tokenizer alone."""
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
    """The perplexities of `text`, whose tokens have these log-likelihoods.

    Bytes are those of UTF-8, words what white space separates, both of `text` and not of its tokens. Where a corpus is
    read in another form than it is counted, `text` is the one to count: of WikiText the raw form, with its spaced
    punctuation, though a model may read it mended. Its published word figures count the ends of lines too:
    `perplexity(..)._replace(words=245_569)` is for the test part of WikiText-2.

    Raises InputError for an empty text.
    """
    if not logprobs or not text:
        raise InputError(f"{len(logprobs)} tokens of a text of {len(text)} characters: expected 1 or more of each")
    return Perplexity(-math.fsum(logprobs), len(logprobs), len(text.encode("utf-8", "replace")), len(text.split()))


def _exp(nats: float, count: int) -> float:
    try:
        return math.exp(nats / count)
    except (OverflowError, ZeroDivisionError):
        return math.inf
