"""Beam search: several texts of each prompt at once, for the likeliest of them."""

from collections.abc import Collection, Sequence
from typing import Annotated, NamedTuple, TypeAlias

import torch

from fgpt.errors import InputError
from fgpt.generation.loop import eos_token_ids, left_pad, prefill_ragged, tokens_left
from fgpt.generation.sampling import GREEDY, SamplingParams
from fgpt.generation.static_cache import decode_step, select_rows
from fgpt.model import GPT
from fgpt.ranges import Range
from fgpt.tree import device

LENGTH_PENALTIES = Range(least=-30, most=30)
"""Outside of it a length to this power overflows."""

LengthPenalty: TypeAlias = Annotated[float, LENGTH_PENALTIES]


class BeamHypothesis(NamedTuple):
    """The new tokens of a text, without the end-of-sequence token, and its score, ln p / length ** length_penalty."""

    tokens: list[int]
    finished: bool
    score: float


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
    """`beam_search_batch` of one prompt: its `num_beams` best texts, best first.

    Args:
        params: The model.
        prompt: Token ids, 1 to n_ctx - 1 of them.
        eos_token_id: The token or tokens that end a text; -1 for none.
        max_new_tokens: Most tokens to add.
        num_beams: Beams, and most hypotheses.
        length_penalty: Above 0 favors longer texts, below 0 shorter ones.
        sampling: Its logits processors act on log-probabilities; the temperature must be 0.

    Raises:
        InputError: as `beam_search_batch` does.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> hypotheses = fgpt.beam_search(params, [1, 2, 3], eos_token_id=0, max_new_tokens=5, num_beams=2)
    >>> len(hypotheses), hypotheses[0].score >= hypotheses[1].score
    (2, True)
    """
    (hypotheses,) = beam_search_batch(
        params,
        [prompt],
        eos_token_id=eos_token_id,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
        sampling=sampling,
    )
    return hypotheses


@torch.no_grad()
def beam_search_batch(
    params: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_id: int | Collection[int],
    max_new_tokens: int,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    sampling: SamplingParams = GREEDY,
    prompt_counts: bool = True,
) -> list[list[BeamHypothesis]]:
    """The `num_beams` best texts of each prompt by a beam search, best first.

    Each step extends the beams of a prompt by their likeliest continuations. Those that end become hypotheses; the
    others are the new beams, until none of them has a better score than the worst of `num_beams` hypotheses. A length
    includes the end-of-sequence token. A beam is scored at its present length, as transformers does; with a penalty
    above 0 it could still have improved. No prompt changes another's texts, and one whose search has ended takes no
    more time.

    Args:
        params: The model.
        prompts: Token ids of each prompt, 1 to n_ctx - 1 of them.
        eos_token_id: The token or tokens that end a text; -1 for none.
        max_new_tokens: Most tokens to add to each prompt.
        num_beams: Beams, and most hypotheses, of each prompt.
        length_penalty: Above 0 favors longer texts, below 0 shorter ones.
        sampling: Its logits processors act on log-probabilities; the temperature must be 0.
        prompt_counts: Whether they read the prompt as well, as transformers' do, or the new tokens alone: then a text
            may repeat n-grams of its prompt.

    Raises:
        InputError: for a prompt that is empty or leaves no room in the context for one new token, fewer than 1 beam, a
            length penalty out of range, or a temperature.

    Source: Wu et al. 2016 (GNMT), section 7, for the length penalty's place; the stopping rule is transformers'.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> options = {"eos_token_id": 0, "max_new_tokens": 5, "num_beams": 2}
    >>> several = fgpt.beam_search_batch(params, [[1, 2, 3], [4]], **options)
    >>> [hypotheses[0].tokens for hypotheses in several] == [
    ...     fgpt.beam_search(params, prompt, **options)[0].tokens for prompt in ([1, 2, 3], [4])
    ... ]
    True
    """
    tokens_left(params, prompts, max_new_tokens)
    eos = eos_token_ids(eos_token_id, params.cfg.vocab_size)
    if num_beams < 1 or sampling.temperature > 0:
        raise InputError(
            f"beam search expects 1 beam or more and temperature 0, got {num_beams} and {sampling.temperature}"
        )
    if not LENGTH_PENALTIES.holds(length_penalty):
        expected = LENGTH_PENALTIES.describe(length_penalty)
        raise InputError(f"length_penalty is {length_penalty}: expected {expected}")
    if not prompts or not max_new_tokens:
        return [[BeamHypothesis([], False, 0.0)] for _ in prompts]
    at, process_logits = device(params), sampling.logits_processor
    eos_tensor = torch.tensor(sorted(eos), dtype=torch.long, device=at)
    limits = torch.tensor([tokens_left(params, [prompt], max_new_tokens) for prompt in prompts], device=at)
    prompt_width, capacity = max(map(len, prompts)), int(limits.max())
    first_counted = 0 if prompt_counts else prompt_width
    hypotheses: list[list[BeamHypothesis]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    # The beams of a prompt are `num_beams` rows in a row. At first they are alike, and one of them counts.
    rows = torch.arange(len(prompts), device=at).repeat_interleave(num_beams)
    scores, cache = prefill_ragged(params, prompts, capacity)
    scores, cache, texts = scores[rows], select_rows(cache, rows), left_pad(prompts, -1, at)[rows]
    beam_logprobs = torch.full((len(prompts), num_beams), -torch.inf, device=at)
    beam_logprobs[:, 0] = 0
    for length in range(1, capacity + 1):
        logprobs = process_logits(scores.float().log_softmax(-1), texts[:, first_counted:])
        totals = beam_logprobs[..., None] + logprobs.unflatten(0, (-1, num_beams))
        best, index = totals.flatten(1).topk(2 * num_beams)
        parents, tokens = index // scores.shape[-1], index % scores.shape[-1]
        ends = torch.isin(tokens, eos_tensor) | (limits[active] == length)[:, None]

        lists = (x[:, :num_beams].tolist() for x in (best, parents, tokens, ends))
        for j, candidates in enumerate(zip(*lists, strict=True)):
            for logprob, parent, token, is_end in zip(*candidates, strict=True):
                if is_end and logprob > -torch.inf:
                    text = texts[j * num_beams + parent, prompt_width:].tolist()
                    text = text if token in eos else [*text, token]
                    hypothesis = BeamHypothesis(text, token in eos, logprob / length**length_penalty)
                    hypotheses[active[j]].append(hypothesis)
            hypotheses[active[j]] = sorted(hypotheses[active[j]], key=lambda x: -x.score)[:num_beams]

        order = ends.int().argsort(stable=True)[:, :num_beams]  # the best candidates that do not end
        beam_logprobs = best.gather(1, order).masked_fill(ends.gather(1, order), -torch.inf)
        best_scores = (beam_logprobs[:, 0] / length**length_penalty).tolist()
        unfinished = [
            j
            for j, (i, score) in enumerate(zip(active, best_scores, strict=True))
            if score > (hypotheses[i][-1].score if len(hypotheses[i]) == num_beams else -torch.inf)
        ]
        if not unfinished:
            break
        active = [active[j] for j in unfinished]
        beam_logprobs, order = beam_logprobs[unfinished], order[unfinished]
        first_rows = num_beams * torch.tensor(unfinished, device=at)[:, None]
        rows = (first_rows + parents[unfinished].gather(1, order)).flatten()
        next_tokens = tokens[unfinished].gather(1, order).flatten()
        texts = torch.cat([texts[rows], next_tokens[:, None]], 1)
        cache = select_rows(cache, rows)  # a copy: a beam that goes on twice has two
        scores = decode_step(params, next_tokens, cache)
    return hypotheses
