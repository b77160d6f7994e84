"""Prompts that several rows of a batch continue."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from fgpt.tree import node


@node
class SharedPrompts:
    """Prompts that rows of a batch continue, each read once, whatever the number of its rows: see `hidden_after`.

    Args:
        tokens: Token ids, padded on the left.
        prompt_of_row: Which prompt each row of the batch continues.
        segments: 1 for text and 0 for padding; None if there is none.
    """

    tokens: Int[Tensor, "prompts seq"]
    prompt_of_row: Int[Tensor, " rows"]
    segments: Int[Tensor, "prompts seq"] | None = None


def pad_prompts(prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int]) -> SharedPrompts:
    """Prompts of any lengths, padded on the left.

    Args:
        prompts: Token ids of each prompt; none of one is a row that continues nothing.
        prompt_of_row: As in `SharedPrompts`.

    >>> pad_prompts([[5, 6], [7]], [0, 0, 1]).tokens
    tensor([[5, 6],
            [0, 7]])
    """
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], dtype=torch.int64)
    segments = None
    if any(len(prompt) < width for prompt in prompts):
        segments = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return SharedPrompts(tokens, torch.tensor(prompt_of_row), segments)
