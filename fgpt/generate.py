"""Text from a model: prefill, then decode token by token over a cache."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.model import GPT, Cache, extend, logits
from fgpt.rng import fold_in
from fgpt.tree import device


class Generated(NamedTuple):
    """New tokens of one prompt, without the end token, and whether the model ended by itself."""

    tokens: list[int]
    finished: bool


def sample(
    logits: Float[Tensor, "batch vocab"], temperature: float, rng: torch.Generator | None
) -> Int[Tensor, " batch"]:
    """The likeliest token at temperature 0, else one drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=rng).squeeze(-1)


@torch.no_grad()
def generate(
    params: GPT,
    prompts: Sequence[Sequence[int]],
    end: int,
    most: int,
    temperature: float = 0.0,
    rng: torch.Generator | None = None,
) -> list[Generated]:
    """Continue each of a batch of ragged prompts by at most `most` tokens, or until `end`.

    Greedy by default. Prompts are padded on the left as a document of their own, so neighbours change nothing in a
    greedy row.

    Raises InputError for an empty prompt, or one with no room in the context for a single new token.
    """
    context = params.cfg.context
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens: expected 1 to {context - 1}, the context less one to write"
            )
    if temperature > 0 and rng is None:
        raise InputError("sampling at a temperature above 0 needs a key: rng=fgpt.key(seed)")
    at = device(params)
    texts, finished, step = [list(prompt) for prompt in prompts], [False] * len(prompts), 0
    # Rows share a cache until the widest is full; narrower ones then begin anew, without its padding.
    while step < most and (going := [i for i, t in enumerate(texts) if not finished[i] and len(t) < context]):
        width = max(len(texts[i]) for i in going)
        pads = [width - len(texts[i]) for i in going]
        tokens = torch.tensor([[0] * pad + texts[i] for pad, i in zip(pads, going, strict=True)], device=at)
        segments = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=at) if any(pads) else None
        h, cache = extend(params, tokens, Cache(), segments)
        full = min(most, step + context - width)
        while True:
            token = sample(logits(params, h[:, -1]), temperature, None if rng is None else fold_in(rng, step))
            for i, t in zip(going, token.tolist(), strict=True):
                finished[i] = finished[i] or t == end
                if not finished[i]:
                    texts[i].append(t)
            step += 1
            if step == full or all(finished[i] for i in going):
                break
            h, cache = extend(params, token[:, None], cache)
    return [Generated(text[len(p) :], done) for p, text, done in zip(prompts, texts, finished, strict=True)]
