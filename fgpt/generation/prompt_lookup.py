"""Prompt lookup decoding: several tokens in one pass where the text repeats itself."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fgpt.generation.loop import GenerationOutput, eos_token_ids, tokens_left
from fgpt.model import GPT, KVCache, forward_with_cache, logits
from fgpt.tree import device


@torch.no_grad()
def prompt_lookup_decode(
    params: GPT,
    prompt: Sequence[int],
    *,
    eos_token_id: int | Collection[int],
    max_new_tokens: int,
    ngram: int = 3,
    num_draft_tokens: int = 10,
) -> GenerationOutput:
    """`generate`'s greedy text of one prompt, faster if it repeats itself: if the last `ngram` tokens occurred before,
    the `num_draft_tokens` tokens that followed them there are verified in one pass, and accepted up to the first that
    the model would not have chosen.

    Equal to `generate`, except that the rounding of a wider matmul may break a tie differently.

    Args:
        params: The model.
        prompt: Token ids, 1 to n_ctx - 1 of them.
        eos_token_id: The token or tokens that end the text; -1 for none.
        max_new_tokens: Most tokens to add.
        ngram: Number of tokens that must have occurred before.
        num_draft_tokens: Most tokens to verify in one pass.

    Raises:
        InputError: for a prompt that is empty or leaves no room in the context for one new token.

    Source: Saxena 2023 (prompt lookup decoding); Leviathan et al. 2023, section 2, for one greedy draft.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> len(fgpt.prompt_lookup_decode(params, [1, 2, 3], eos_token_id=-1, max_new_tokens=5).tokens)
    5
    """
    eos = eos_token_ids(eos_token_id, params.cfg.vocab_size)
    max_new_tokens = tokens_left(params, [prompt], max_new_tokens)
    if not max_new_tokens:
        return GenerationOutput([], False, [])
    text, max_length = list(prompt), len(prompt) + max_new_tokens
    h, cache = forward_with_cache(params, torch.tensor([text], device=device(params)), KVCache())
    scores = logits(params, h[:, -1:])
    draft: list[int] = []
    while True:
        chosen: list[int] = scores[0].argmax(-1).tolist()
        num_accepted = 0
        while num_accepted < len(draft) and draft[num_accepted] == chosen[num_accepted]:
            num_accepted += 1
        for token in chosen[: num_accepted + 1]:
            if token in eos:
                return GenerationOutput(text[len(prompt) :], True, [])
            text.append(token)
        if len(text) == max_length:
            return GenerationOutput(text[len(prompt) :], False, [])
        cache = _truncate(cache, len(text) - 1)
        draft = propose_ngram(text, ngram, min(num_draft_tokens, max_length - len(text) - 1))
        h, cache = forward_with_cache(params, torch.tensor([[text[-1], *draft]], device=device(params)), cache)
        scores = logits(params, h)


def propose_ngram(text: Sequence[int], ngram: int, num_draft_tokens: int) -> list[int]:
    """The tokens that followed the previous occurrence of the last `ngram` tokens; none if there is no other."""
    last = list(text[-ngram:])
    for start in range(len(text) - ngram - 1, -1, -1):
        end = start + ngram
        if list(text[start:end]) == last:
            return list(text[end : end + num_draft_tokens])
    return []


def _truncate(cache: KVCache, length: int) -> KVCache:
    """The cache of the first `length` tokens."""

    def first(x: Tensor) -> Tensor:
        return x[..., :length, :]

    return KVCache(tuple((first(k), first(v)) for k, v in cache.kv), cache.segments)
