"""Products of a few rows: y = x Wᵀ, one pass over W.

A step of writing reads every weight for a row or a few, so that its limit is the bandwidth of memory. On a CPU the
libraries' product reads W at a third of it. The same product as a sum, which a compiler makes one loop over W's rows
with x in cache, comes near it; so this holds while compiling, and the library's product elsewhere.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.functorch_state import in_transform
from fgpt.kernels.precision import wide

MOST = 8
"""Rows: at each, W's row is read again from cache; with more, a library's blocking wins."""


def use_gemv(x: Float[Tensor, "*batch in"]) -> bool:
    """Whether `x` is to be multiplied here: a few rows on a CPU, in code being compiled and not differentiated."""
    return (
        torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.shape[:-1].numel() <= MOST
        and not in_transform()
    )


def gemv(x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"]) -> Float[Tensor, "*batch out"]:
    """x Wᵀ, summed in fp32, or in fp64 where x is."""
    dtype = wide(x.dtype)
    rows, w = x.reshape(-1, x.shape[-1]).to(dtype), w.to(dtype)
    y = torch.stack([(w * row).sum(-1) for row in rows])  # one loop over W for all of them
    return y.view(*x.shape[:-1], w.shape[0]).to(x.dtype)
