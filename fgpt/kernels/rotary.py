"""Rotary position embedding: pairs of components of a query or key, rotated by an angle that grows with the position.

    (a_i, b_i)  ->  (a_i cos pθ_i - b_i sin pθ_i,  b_i cos pθ_i + a_i sin pθ_i)        θ_i = base^(-2i / d)

so that qᵀk depends only on the distance of the two. Component i of the first half of a head is paired with component i
of the second half, or, as in GPT-J, each even component with the odd one that follows.

It is the definition, in plain torch, with angles in fp32: every transform and the compiler pass.

Source: Su et al. 2021 (RoFormer), section 3.2.2.
"""

import math
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.kernels.precision import at_least_fp32, wide

RopeCosSin: TypeAlias = tuple[Float[Tensor, "*#batch 1 seq pair"], Float[Tensor, "*#batch 1 seq pair"]]
"""(cos, sin) of every token's angles; the same for all heads, and for all rows if they have the same positions."""
RopeScaling: TypeAlias = tuple[float, float, float, float]
"""(factor, low, high, context): low frequencies are divided by `factor`, high ones stay, those between are mixed."""


class YarnScaling(NamedTuple):
    """YaRN: low frequencies are divided by `factor`, high ones stay, and those between are mixed by their index.

    High is a frequency that makes more than `beta_fast` rotations in `context` positions, low one that makes fewer than
    `beta_slow`; with `truncate` the indices of these two are integers. Queries and keys are multiplied by
    `attention_factor`.

    Source: Peng et al. 2023 (YaRN), sections 3.2 to 3.4.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    context: float
    attention_factor: float
    truncate: bool = True

    def ramp(self, dim: int, base: float) -> tuple[float, float]:
        """(start, width), in indices of frequencies, of the ramp from those that stay to those that are divided.

        Raises:
            ValueError, OverflowError: if the fields are out of range.
        """

        def index(rotations: float) -> float:
            return dim * math.log(self.context / (rotations * 2 * math.pi)) / (2 * math.log(base))

        fast, slow = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            fast, slow = math.floor(fast), math.ceil(slow)
        first, last = max(fast, 0), min(slow, dim - 1)
        return first, last - first or 0.001


class DynamicScaling(NamedTuple):
    """Dynamic NTK: in a text of n > `context` tokens all angles are those of a larger base:

        base' = base (factor n / context - factor + 1)^(dim / (dim - 2))

    Each further token rotates all keys anew, so beyond `context` no key can be cached.

    Source: Peng et al. 2023 (YaRN), appendix B.
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
    """(cos, sin) of the angles of `dim` components at the given positions, in fp32, or in fp64 if `dtype` is.

    A `RopeScaling` keeps a frequency whose period is below context / high positions and divides one whose period is
    above context / low; (factor, 1, 4, 0) divides them all, which is linear position interpolation.

    Args:
        positions: The position of each token in its text.
        dim: How many components of a head are rotated, an even number.
        base: The base of the angles, `rope_theta`.
        scaling: How the angles are scaled for a longer context.
        dtype: The dtype of the activations.
        length: The length of each token's text, for `DynamicScaling` alone.

    Source: Grattafiori et al. 2024 (Llama 3), section 3.2; Chen et al. 2023 (Position Interpolation), equation 3.
    """
    exponent = torch.arange(0, dim, 2, dtype=wide(dtype), device=positions.device) / dim
    theta, size = 1.0 / base**exponent, 1.0
    if isinstance(scaling, YarnScaling):
        indices = torch.arange(dim // 2, dtype=theta.dtype, device=theta.device)
        start, width = scaling.ramp(dim, base)
        fraction = ((indices - start) / width).clamp(0, 1)
        theta, size = (1 - fraction) * theta + fraction * theta / scaling.factor, scaling.attention_factor
    elif isinstance(scaling, DynamicScaling):
        longer = torch.as_tensor(length, device=theta.device).clamp(min=scaling.context).to(theta.dtype)
        grown = base * (scaling.factor * longer / scaling.context - (scaling.factor - 1)) ** (dim / (dim - 2))
        theta = (1.0 / grown[..., None] ** exponent)[..., None, :, :] if grown.ndim else 1.0 / grown**exponent
    elif scaling is not None:
        factor, low, high, context = scaling
        rotations = context * theta / (2 * math.pi)
        fraction = ((rotations - low) / (high - low)).clamp(0, 1)
        theta = fraction * theta + (1 - fraction) * theta / factor
    angles = positions[..., None, :, None] * theta
    if size == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * size, angles.sin() * size


def apply_rope(
    x: Float[Tensor, "*batch head seq d_head"], rope: RopeCosSin, interleaved: bool
) -> Float[Tensor, "*batch head seq d_head"]:
    """x with the first components of each head rotated, in fp32 or fp64, and the rest unchanged.

    Args:
        x: Queries or keys by head.
        rope: Of `rope_cos_sin`.
        interleaved: Rotated pairs are neighbors, as in GPT-J; otherwise one component of each half.
    """
    cos, sin = rope
    dim = 2 * cos.shape[-1]
    first, rest = at_least_fp32(x[..., :dim]), x[..., dim:]
    a, b = (first[..., 0::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)
    pairs = a * cos - b * sin, b * cos + a * sin
    rotated = (torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)).to(x.dtype)
    return torch.cat([rotated, rest], -1) if rest.shape[-1] else rotated
