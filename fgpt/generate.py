"""Text from a model: prefill, then decode token by token over a cache."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.model import GPT, Cache, extend, logits
from fgpt.rng import fold_in


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
    width = max(len(p) for p in prompts)
    device = params.wpe.w.device if isinstance(params.wpe.w, Tensor) else None
    tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    ragged = any(len(p) < width for p in prompts)
    segments = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device) if ragged else None
    h, cache = extend(params, tokens, Cache(), segments)
    written: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for step in range(min(most, context - width)):
        key = fold_in(rng, step) if rng is not None else None
        token = sample(logits(params, h[:, -1]), temperature, key)
        for i, t in enumerate(token.tolist()):
            finished[i] = finished[i] or t == end
            if not finished[i]:
                written[i].append(t)
        if all(finished):
            break
        h, cache = extend(params, token[:, None], cache)
    return [Generated(tokens, done) for tokens, done in zip(written, finished, strict=True)]
