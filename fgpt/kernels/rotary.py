"""Rotary positions: pairs of components of a query or key, turned by an angle that grows with the position.

    (a_i, b_i)  ->  (a_i cos pθ_i - b_i sin pθ_i,  b_i cos pθ_i + a_i sin pθ_i)        θ_i = base^(-2i / d)

so that qᵀk depends on the distance of the two alone. The pairs of a head are its first half beside its second, or, as
in GPT-J, each even component beside the odd one that follows.

Source: Su et al. 2021 (RoFormer), section 3.2.2.
"""

import math
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.kernels.precision import at_least_fp32, wide

Turn: TypeAlias = tuple[Float[Tensor, "*#batch 1 seq pair"], Float[Tensor, "*#batch 1 seq pair"]]
"""(cos, sin) of every token's angles, the same for all heads, and for all rows where their positions are."""
Stretch: TypeAlias = tuple[float, float, float, float]
"""(factor, low, high, context): slow angles are divided by `factor`, fast ones kept, and those between are mixed."""


def turn(
    positions: Int[Tensor, "*batch seq"],
    dim: int,
    base: float,
    stretch: Stretch | None = None,
    dtype: torch.dtype = torch.float32,
) -> Turn:
    """The turns of `dim` components at the given positions, in fp32, or in fp64 for an x that is.

    An angle that comes round in fewer than context / high positions is kept, one that takes more than context / low is
    divided; (factor, 1, 4, 0) divides them all, which is linear position interpolation.

    Source: Grattafiori et al. 2024 (Llama 3), section 3.2; Chen et al. 2023 (Position Interpolation), equation 3.
    """
    exponent = torch.arange(0, dim, 2, dtype=wide(dtype), device=positions.device) / dim
    theta = 1.0 / base**exponent
    if stretch is not None:
        factor, low, high, context = stretch
        rounds = context * theta / (2 * math.pi)
        kept = ((rounds - low) / (high - low)).clamp(0, 1)
        theta = kept * theta + (1 - kept) * theta / factor
    angles = positions[..., None, :, None] * theta
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "*batch head seq d_head"], by: Turn, interleaved: bool
) -> Float[Tensor, "*batch head seq d_head"]:
    """The first components of each head turned, in fp32 or fp64; the rest as they are."""
    cos, sin = by
    dim = 2 * cos.shape[-1]
    first, rest = at_least_fp32(x[..., :dim]), x[..., dim:]
    a, b = (first[..., 0::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)
    pairs = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([turned.to(x.dtype), rest], -1) if rest.shape[-1] else turned.to(x.dtype)
