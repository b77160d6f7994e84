"""Two other ways through the same model: several texts at once for the likeliest one, and several tokens at once where
the text repeats itself.
"""

from collections.abc import Collection, Sequence
from typing import Annotated, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fgpt.errors import InputError
from fgpt.generation.loop import GenerationOutput, eos_ids, tokens_left
from fgpt.generation.sampling import GREEDY, SamplingParams
from fgpt.model import GPT, KVCache, forward_with_cache, logits
from fgpt.ranges import Range
from fgpt.tree import device, tree_map

PENALTIES = Range(least=-30, most=30)
"""Beyond them a length to this power is no finite number."""

LengthPenalty: TypeAlias = Annotated[float, PENALTIES]


class BeamHypothesis(NamedTuple):
    """New tokens of a text, without the end token, and their log-probability over length ** length_penalty."""

    tokens: list[int]
    finished: bool
    score: float


@torch.no_grad()
def beam_search(
    params: GPT,
    prompt: Sequence[int],
    eos_token_id: int | Collection[int],
    max_new_tokens: int,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    sampling: SamplingParams = GREEDY,
) -> list[BeamHypothesis]:
    """The best `beams` texts that beam search finds, best first: at each step the likeliest continuations of all open
    texts stay open, and those of them that end are set apart, until no open one could still be better.

    Lengths count the end token. An open text is judged by its score at its present length, as others do; with a
    penalty above 0 it might still have grown better. The filters of `sampling` act on log-probabilities.

    Raises InputError for a prompt with no room to write, fewer than 1 beam, a length penalty out of
    range, or a temperature.

    Source: Wu et al. 2016 (GNMT), section 7, for the length penalty's place; the rule of stopping is transformers'.
    """
    max_new_tokens, enders = tokens_left(params, [prompt], max_new_tokens), eos_ids(eos_token_id, params.cfg.vocab_size)
    if num_beams < 1 or sampling.temperature > 0:
        raise InputError(
            f"beam search takes 1 beam or more, and draws nothing; got {num_beams}, {sampling.temperature}"
        )
    if not PENALTIES.holds(length_penalty):
        raise InputError(f"length_penalty is {length_penalty}: expected {PENALTIES.expected(length_penalty)}")
    at, choose = device(params), sampling.filter
    stopping = torch.tensor(sorted(enders), dtype=torch.long, device=at)
    if not max_new_tokens:
        return [BeamHypothesis([], False, 0.0)]
    done: list[BeamHypothesis] = []
    texts: list[list[int]] = [[]]
    scores = torch.zeros(1, device=at)
    h, cache = forward_with_cache(params, torch.tensor([list(prompt)], device=at), KVCache())
    for length in range(1, max_new_tokens + 1):
        seen = torch.tensor([[*prompt, *text] for text in texts], device=at)
        chances = choose(logits(params, h[:, -1]).float().log_softmax(-1), seen) + scores[:, None]
        best, where = chances.flatten().topk(min(2 * num_beams, chances.numel()))
        rows, tokens = where // chances.shape[1], where % chances.shape[1]
        ends = torch.isin(tokens, stopping) | (length == max_new_tokens)
        ranked = zip(best.tolist(), rows.tolist(), tokens.tolist(), ends.tolist(), strict=True)
        for score, row, token, stops in list(ranked)[:num_beams]:
            if stops and score > -torch.inf:
                text = texts[row] if token in enders else [*texts[row], token]
                done.append(BeamHypothesis(text, token in enders, score / length**length_penalty))
        done = sorted(done, key=lambda x: -x.score)[:num_beams]
        open_ = (~ends).nonzero().flatten()[:num_beams]
        if not len(open_) or (
            len(done) == num_beams and best[open_[0]].item() / length**length_penalty <= done[-1].score
        ):
            break
        rows, tokens, scores = rows[open_], tokens[open_], best[open_]
        texts = [[*texts[row], token] for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        h, cache = forward_with_cache(params, tokens[:, None], tree_map(lambda x, rows=rows: x[rows], cache))
    return done


@torch.no_grad()
def prompt_lookup_decode(
    params: GPT,
    prompt: Sequence[int],
    eos_token_id: int | Collection[int],
    max_new_tokens: int,
    ngram: int = 3,
    num_draft_tokens: int = 10,
) -> GenerationOutput:
    """`generate`'s greedy text of one prompt, faster where it repeats: where the last `ngram` tokens stood before, the
    `ahead` tokens that followed them there are tried in one pass, and kept as far as the model would have written them.

    Equal to `generate` but for ties that the rounding of a wider product breaks otherwise.

    Raises InputError for a prompt with no room to write.

    Source: Saxena 2023 (prompt lookup decoding); Leviathan et al. 2023, section 2, for one draft taken greedily.
    """
    enders = eos_ids(eos_token_id, params.cfg.vocab_size)
    if not (max_new_tokens := tokens_left(params, [prompt], max_new_tokens)):
        return GenerationOutput([], False, [])
    at, text = device(params), list(prompt)
    h, cache = forward_with_cache(params, torch.tensor([list(prompt)], device=at), KVCache())
    scores = logits(params, h[:, -1:])
    tried: list[int] = []
    while True:
        chosen = scores[0].argmax(-1).tolist()
        right = next((i for i, token in enumerate(tried) if token != chosen[i]), len(tried))
        for token in chosen[: right + 1]:
            if token in enders:
                return GenerationOutput(text[len(prompt) :], True, [])
            text.append(token)
        if len(text) - len(prompt) == max_new_tokens:
            return GenerationOutput(text[len(prompt) :], False, [])
        cache = _until(cache, len(text) - 1)
        tried = propose_ngram(text, ngram, min(num_draft_tokens, max_new_tokens - (len(text) - len(prompt)) - 1))
        h, cache = forward_with_cache(params, torch.tensor([[text[-1], *tried]], device=at), cache)
        scores = logits(params, h)


def propose_ngram(text: Sequence[int], ngram: int, ahead: int) -> list[int]:
    """What followed the last `ngram` tokens where they last stood before; nothing where they did not."""
    last = list(text[-ngram:])
    for start in range(len(text) - ngram - 1, -1, -1):
        if list(text[start : start + ngram]) == last:
            return list(text[start + ngram : start + ngram + ahead])
    return []


def _until(cache: KVCache, length: int) -> KVCache:
    """The cache of the first `length` tokens."""
    return KVCache(tuple((_first(k, length), _first(v, length)) for k, v in cache.kv), cache.segments)


def _first(x: Tensor, length: int) -> Tensor:
    return x[..., :length, :]
