"""Orthogonalization of matrices by Newton-Schulz iterations, as in Muon:

    X ← G / ‖G‖        X ← aX + (bA + cA²)X,  A = XXᵀ        five times

The result is near UVᵀ, for G = USVᵀ: its singular values are between 0.7 and 1.2. Of a G that is 0 it is 0.

    reference     one matrix after the other; `orthogonalize` takes matrices of one shape in one product
    transforms    plain torch: every transform passes, and vmap takes each member's own matrix

All of it is computed at least in fp32.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.leaf_lists import groups
from fgpt.kernels.precision import at_least_fp32

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c: the largest slope at 0 whose iterations stay near 1."""
EPS = 1e-7
"""Least norm that a matrix is divided by."""


def reference(g: Float[Tensor, "*batch out in"], steps: int) -> Float[Tensor, "*batch out in"]:
    """The definition, for one matrix or a batch of them."""
    a, b, c = COEFFICIENTS
    x = g.mT if g.shape[-2] > g.shape[-1] else g  # the smaller of both products
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


def orthogonalize(gs: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Each matrix, [out, in], orthogonalized on its own."""
    result = [at_least_fp32(g) for g in gs]
    for indices in groups(result, [(g.shape, g.dtype, g.device) for g in result]):
        batch = reference(torch.stack([result[i] for i in indices]), steps)
        for i, x in zip(indices, batch.unbind(), strict=True):
            result[i] = x
    return result
