"""Trees and gradients for 8-bit AdamW."""

import torch
from torch import Tensor

import fgpt

SIZES = {"w": (64, 64), "odd": (67, 71), "wide": (3, 2311), "small": (63, 65), "bias": (5000,), "b": (9,)}
MIXED_TREE = {name: torch.randn(size, generator=fgpt.key(i)) for i, (name, size) in enumerate(SIZES.items())}
CODED = ["w", "odd", "wide", "bias"]  # 4,096 numbers or more; all but the first do not fill their last block


def gradients_of_step(step: int, spread: float = 1.0) -> dict[str, Tensor]:
    """Normal, of unequal sizes; `spread` > 1 gives each leaf a heavy tail."""
    rng = fgpt.key(100 + step)
    normal = {name: torch.randn(x.shape, generator=rng) for name, x in MIXED_TREE.items()}
    return {name: 10.0 ** (i - 3) * x.sign() * x.abs() ** spread for i, (name, x) in enumerate(normal.items())}
