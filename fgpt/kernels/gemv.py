"""Matrix-vector product: y = x Wᵀ for a few rows of x, in one pass over W.

A decode step reads every weight for one row or a few, so that it is limited by memory bandwidth. On a CPU a library's
matrix product reads W at a third of it. The same product as a sum, which a compiler turns into one loop over W's rows
with x in cache, comes near it: it is used in code that is being compiled, and the library's product elsewhere.

    reference     x @ w.T
    fast path     sums, one loop over W after compiling
    transforms    none: `use_gemv` is False under every transform, and wherever gradients are recorded
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.functorch_state import in_transform
from fgpt.kernels.precision import wide

MAX_ROWS = 8
"""For each row of x, a row of W is read again from cache: with more rows, a library's blocking is faster."""


def use_gemv(x: Float[Tensor, "*batch in"]) -> bool:
    """Whether `gemv` is the faster product: a few rows on a CPU, in code being compiled and not differentiated."""
    return (
        torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.shape[:-1].numel() <= MAX_ROWS
        and not in_transform()
    )


def reference(x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"]) -> Float[Tensor, "*batch out"]:
    """The definition."""
    return x @ w.T


def gemv(x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"]) -> Float[Tensor, "*batch out"]:
    """x Wᵀ, summed in fp32, or in fp64 if x is."""
    dtype = wide(x.dtype)
    rows, w = x.reshape(-1, x.shape[-1]).to(dtype), w.to(dtype)
    y = torch.stack([(w * row).sum(-1) for row in rows])  # one loop over W for all of them
    return y.view(*x.shape[:-1], w.shape[0]).to(x.dtype)
