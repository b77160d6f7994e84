"""Product of a few rows with a matrix: y = x Wᵀ + bias, in one pass over W.

A decode step reads every weight for one row or a few, so that it is limited by memory bandwidth. torch's product is
MKL's in fp32, which reads W with one core for one row, and far below the bandwidth for several. Two ways come nearer:

    eager       oneDNN's product, on the weights as they are: on two idle cores 1.5 to 3 times MKL's speed for 1 to 8
                rows; on one core it is as fast for one row, and 1.1 to 2 times as fast for several
    compiled    a sum, which a compiler turns into one loop over W's rows with x in cache

    reference     x @ w.T + bias
    fast path     `dense_linear`: the two above, where `use_gemv` says so
    transforms    torch's product: `use_gemv` is False under every transform, and wherever gradients are recorded

For more rows, and for training, `onednn_linear` may be the faster product: `dense_linear` chooses among all of them.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels import onednn_linear as onednn
from fgpt.kernels.functorch_state import in_transform
from fgpt.kernels.precision import wide

MAX_ROWS_COMPILED = 8
"""For each row of x, a row of W is read again from cache: with more rows, a library's blocking is faster."""
MAX_ROWS = 64
"""Beyond it a product is limited by arithmetic."""


def use_gemv(x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"]) -> bool:
    """Whether `gemv` is the faster product: a few rows on a CPU, not differentiated; eager in fp32 alone, as torch's
    product in half precision is oneDNN's already.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or in_transform():
        return False
    rows = x.shape[:-1].numel()
    if torch.compiler.is_compiling():
        return rows <= MAX_ROWS_COMPILED
    is_fast = w.numel() >= onednn.MIN_ELEMENTS and onednn.has_onednn_order(w)
    return onednn.HAS_ONEDNN and rows <= MAX_ROWS and is_fast and x.dtype == w.dtype == torch.float32


def dense_linear(
    x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + bias by the fastest product."""
    if use_gemv(x, w):
        return gemv(x, w, bias)
    return onednn.onednn_linear(x, w, bias) if onednn.use_onednn(x, w) else F.linear(x, w, bias)


def reference(
    x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """The definition."""
    return x @ w.T if bias is None else x @ w.T + bias


def gemv(
    x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + bias, where `use_gemv` holds."""
    if not torch.compiler.is_compiling():
        return onednn.onednn_product(x, w, bias)
    return sums(x, w) if bias is None else sums(x, w) + bias


def sums(x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"]) -> Float[Tensor, "*batch out"]:
    """x Wᵀ, summed in fp32, or in fp64 if x is: to be compiled."""
    dtype = wide(x.dtype)
    rows, w = x.reshape(-1, x.shape[-1]).to(dtype), w.to(dtype)
    y = torch.stack([(w * row).sum(-1) for row in rows])  # one loop over W for all of them
    return y.view(*x.shape[:-1], w.shape[0]).to(x.dtype)
