"""Random cases of cross-entropy."""

import torch
from torch import Tensor

import fgpt

Case = tuple[list[Tensor], Tensor, Tensor, Tensor]


def random_case(n: int, vocab: int, widths: list[int], seed: int = 0) -> Case:
    rng = fgpt.key(seed)
    xw = [torch.randn(size, d, generator=rng) for d in widths for size in (n, vocab)]
    return (
        xw,
        torch.randn(vocab, generator=rng),
        torch.randint(vocab, (n,), generator=rng),
        torch.rand(n, generator=rng),
    )
