"""Beam search: several texts of one prompt at once, for the likeliest of them."""

from collections.abc import Collection, Sequence
from typing import Annotated, NamedTuple, TypeAlias

import torch

from fgpt.errors import InputError
from fgpt.generation.loop import eos_token_ids, tokens_left
from fgpt.generation.sampling import GREEDY, SamplingParams
from fgpt.model import GPT, KVCache, forward_with_cache, logits
from fgpt.ranges import Range
from fgpt.tree import device, tree_map

LENGTH_PENALTIES = Range(least=-30, most=30)
"""Outside of it a length to this power overflows."""

LengthPenalty: TypeAlias = Annotated[float, LENGTH_PENALTIES]


class BeamHypothesis(NamedTuple):
    """The new tokens of a text, without the end-of-sequence token, and its score, ln p / length ** length_penalty."""

    tokens: list[int]
    finished: bool
    score: float


@torch.no_grad()
def beam_search(
    params: GPT,
    prompt: Sequence[int],
    *,
    eos_token_id: int | Collection[int],
    max_new_tokens: int,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    sampling: SamplingParams = GREEDY,
) -> list[BeamHypothesis]:
    """The `num_beams` best texts of a beam search, best first.

    Each step extends the beams by their likeliest continuations. Those that end become hypotheses; the others are the
    new beams, until none of them has a better score than the worst of `num_beams` hypotheses. A length includes the
    end-of-sequence token. A beam is scored at its present length, as transformers does; with a penalty above 0 it could
    still have improved.

    Args:
        params: The model.
        prompt: Token ids, 1 to n_ctx - 1 of them.
        eos_token_id: The token or tokens that end a text; -1 for none.
        max_new_tokens: Most tokens to add.
        num_beams: Beams, and most hypotheses.
        length_penalty: Above 0 favors longer texts, below 0 shorter ones.
        sampling: Its logits processors act on log-probabilities; the temperature must be 0.

    Raises:
        InputError: for a prompt that is empty or leaves no room in the context for one new token, fewer than 1 beam, a
            length penalty out of range, or a temperature.

    Source: Wu et al. 2016 (GNMT), section 7, for the length penalty's place; the stopping rule is transformers'.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> hypotheses = fgpt.beam_search(params, [1, 2, 3], eos_token_id=0, max_new_tokens=5, num_beams=2)
    >>> len(hypotheses), hypotheses[0].score >= hypotheses[1].score
    (2, True)
    """
    max_new_tokens = tokens_left(params, [prompt], max_new_tokens)
    eos = eos_token_ids(eos_token_id, params.cfg.vocab_size)
    if num_beams < 1 or sampling.temperature > 0:
        raise InputError(
            f"beam search expects 1 beam or more and temperature 0, got {num_beams} and {sampling.temperature}"
        )
    if not LENGTH_PENALTIES.holds(length_penalty):
        expected = LENGTH_PENALTIES.describe(length_penalty)
        raise InputError(f"length_penalty is {length_penalty}: expected {expected}")
    if not max_new_tokens:
        return [BeamHypothesis([], False, 0.0)]
    at, process_logits = device(params), sampling.logits_processor
    eos_tensor = torch.tensor(sorted(eos), dtype=torch.long, device=at)
    hypotheses: list[BeamHypothesis] = []
    beams: list[list[int]] = [[]]
    beam_logprobs = torch.zeros(1, device=at)
    h, cache = forward_with_cache(params, torch.tensor([list(prompt)], device=at), KVCache())
    for length in range(1, max_new_tokens + 1):
        past_tokens = torch.tensor([[*prompt, *beam] for beam in beams], device=at)
        logprobs = process_logits(logits(params, h[:, -1]).float().log_softmax(-1), past_tokens)
        logprobs = logprobs + beam_logprobs[:, None]
        best, index = logprobs.flatten().topk(min(2 * num_beams, logprobs.numel()))
        rows, tokens = index // logprobs.shape[1], index % logprobs.shape[1]
        ends = torch.isin(tokens, eos_tensor) | (length == max_new_tokens)
        candidates = zip(best.tolist(), rows.tolist(), tokens.tolist(), ends.tolist(), strict=True)
        for logprob, row, token, is_end in list(candidates)[:num_beams]:
            if is_end and logprob > -torch.inf:
                text = beams[row] if token in eos else [*beams[row], token]
                hypotheses.append(BeamHypothesis(text, token in eos, logprob / length**length_penalty))
        hypotheses = sorted(hypotheses, key=lambda x: -x.score)[:num_beams]
        extended = (~ends).nonzero().flatten()[:num_beams]
        if not len(extended):
            break
        best_score = best[extended[0]].item() / length**length_penalty
        if len(hypotheses) == num_beams and best_score <= hypotheses[-1].score:
            break
        rows, tokens, beam_logprobs = rows[extended], tokens[extended], best[extended]
        beams = [[*beams[row], token] for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        cache = tree_map(lambda x, rows=rows: x[rows], cache)
        h, cache = forward_with_cache(params, tokens[:, None], cache)
    return hypotheses
