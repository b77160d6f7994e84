"""The norms of a base weight's rows, and its product with a thin matrix, without a whole fp32 copy of it:

    ‖w_i‖²        W Aᵀ

A chunk of rows at a time is dequantized or cast, and used twice while it is in cache. A sharded W is gathered first.

    reference     both of the whole matrix, which is also the fast path for a tensor of the dtype of A
    fast path     chunk by chunk
    transforms    plain torch, but no derivative reaches a quantized W; DoRA takes the norms as constants
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.chunks import chunk_size
from fgpt.kernels.quantized_linear import FrozenMatrix, Quantized, dequantize, gather_matrix, slice_rows

CHUNK = 1 << 18
"""Elements of the matrix expanded at once on a CPU: 1 MB of fp32."""


def reference(
    w: Float[Tensor, "out in"], a: Float[Tensor, "rank in"]
) -> tuple[Float[Tensor, " out"], Float[Tensor, "out rank"]]:
    """The definition."""
    return torch.linalg.vector_norm(w, dim=-1).square(), F.linear(w, a)


def row_sq_and_cross(
    w: Float[Tensor, "out in"] | FrozenMatrix, a: Float[Tensor, "rank in"]
) -> tuple[Float[Tensor, " out"], Float[Tensor, "out rank"]]:
    """(‖w_i‖², w_i Aᵀ) for every row i, in the dtype of A."""
    w = gather_matrix(w)
    if isinstance(w, Tensor) and w.dtype == a.dtype:
        return reference(w, a)
    out, inp = w.shape
    step = max(1, chunk_size(a.device, CHUNK) // inp)
    if step >= out:
        return reference(_rows(w, slice(None), a.dtype), a)
    chunks = [reference(_rows(w, slice(i, i + step), a.dtype), a) for i in range(0, out, step)]
    return torch.cat([squares for squares, _ in chunks]), torch.cat([cross for _, cross in chunks])


def _rows(w: Tensor | Quantized, rows: slice, dtype: torch.dtype) -> Float[Tensor, "rows in"]:
    return w[rows].to(dtype) if isinstance(w, Tensor) else dequantize(slice_rows(w, rows), torch.float32).to(dtype)
