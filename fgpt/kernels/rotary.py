"""Rotary positions: pairs of components of a query or key, turned by an angle that grows with the position.

    (a_i, b_i)  ->  (a_i cos pθ_i - b_i sin pθ_i,  b_i cos pθ_i + a_i sin pθ_i)        θ_i = base^(-2i / d)

so that qᵀk depends on the distance of the two alone. The pairs of a head are its first half beside its second, or, as
in GPT-J, each even component beside the odd one that follows.

Source: Su et al. 2021 (RoFormer), section 3.2.2.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.kernels.precision import at_least_fp32, wide

RopeCosSin: TypeAlias = tuple[Float[Tensor, "*#batch 1 seq pair"], Float[Tensor, "*#batch 1 seq pair"]]
"""(cos, sin) of every token's angles, the same for all heads, and for all rows where their positions are."""
RopeScaling: TypeAlias = tuple[float, float, float, float]
"""(factor, low, high, context): slow angles are divided by `factor`, fast ones kept, and those between are mixed."""


class YarnScaling(NamedTuple):
    """YaRN: slow angles are divided by `factor`, fast ones kept, and those between are mixed by their place among all.

    Fast is what comes round more than `beta_fast` times in `context` positions, slow what does fewer than `beta_slow`
    times; with `truncate` the places of these two are whole numbers. Queries and keys grow by `attention_factor`.

    Source: Peng et al. 2023 (YaRN), sections 3.2 to 3.4.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    context: float
    attention_factor: float
    truncate: bool = True

    def divided(self, dim: int, base: float) -> Callable[[Tensor], Tensor]:
        """By the places of angles: the share of each that is divided."""
        fast, slow = (
            dim * math.log(self.context / (rounds * 2 * math.pi)) / (2 * math.log(base))
            for rounds in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            fast, slow = math.floor(fast), math.ceil(slow)
        first, last = max(fast, 0), min(slow, dim - 1)
        width = last - first or 0.001
        return lambda places: ((places - first) / width).clamp(0, 1)


class DynamicScaling(NamedTuple):
    """Dynamic NTK: in a text of n > `context` tokens all angles are those of a larger base, up to `factor` * `context`:

        base' = base (factor n / context - factor + 1)^(dim / (dim - 2))

    A further token turns all keys anew, so that no key can be kept for it. Source: Peng et al. 2023 (YaRN), appendix B.
    """

    factor: float
    context: int


def rope_cos_sin(
    positions: Int[Tensor, "*batch seq"],
    dim: int,
    base: float,
    scaling: RopeScaling | YarnScaling | DynamicScaling | None = None,
    dtype: torch.dtype = torch.float32,
    length: int | Int[Tensor, "*batch seq"] = 0,
) -> RopeCosSin:
    """The turns of `dim` components at the given positions, in fp32, or in fp64 for an x that is. `length` is that of
    each token's text, which Dynamic alone asks for.

    An angle that comes round in fewer than context / high positions is kept, one that takes more than context / low is
    divided; (factor, 1, 4, 0) divides them all, which is linear position interpolation.

    Source: Grattafiori et al. 2024 (Llama 3), section 3.2; Chen et al. 2023 (Position Interpolation), equation 3.
    """
    exponent = torch.arange(0, dim, 2, dtype=wide(dtype), device=positions.device) / dim
    theta, size = 1.0 / base**exponent, 1.0
    if isinstance(scaling, YarnScaling):
        places = torch.arange(dim // 2, dtype=theta.dtype, device=theta.device)
        share = scaling.divided(dim, base)(places)
        theta, size = (1 - share) * theta + share * theta / scaling.factor, scaling.attention_factor
    elif isinstance(scaling, DynamicScaling):
        longer = torch.as_tensor(length, device=theta.device).clamp(min=scaling.context).to(theta.dtype)
        grown = base * (scaling.factor * longer / scaling.context - (scaling.factor - 1)) ** (dim / (dim - 2))
        theta = (1.0 / grown[..., None] ** exponent)[..., None, :, :] if grown.ndim else 1.0 / grown**exponent
    elif scaling is not None:
        factor, low, high, context = scaling
        rounds = context * theta / (2 * math.pi)
        kept = ((rounds - low) / (high - low)).clamp(0, 1)
        theta = kept * theta + (1 - kept) * theta / factor
    angles = positions[..., None, :, None] * theta
    if size == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * size, angles.sin() * size


def apply_rope(
    x: Float[Tensor, "*batch head seq d_head"], by: RopeCosSin, interleaved: bool
) -> Float[Tensor, "*batch head seq d_head"]:
    """The first components of each head turned, in fp32 or fp64; the rest as they are."""
    cos, sin = by
    dim = 2 * cos.shape[-1]
    first, rest = at_least_fp32(x[..., :dim]), x[..., dim:]
    a, b = (first[..., 0::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)
    pairs = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([turned.to(x.dtype), rest], -1) if rest.shape[-1] else turned.to(x.dtype)
