"""Rows of a base weight by index: W[tokens].

torch's CPU kernel sums the gradients of a token's occurrences in the dtype of the table: in bf16 the sum is 3 % off
over 1,000 occurrences and 32 % over 4,096. A table that is trained is therefore read once for each token that occurs,
and those rows are repeated in fp32.

    reference     W[tokens]
    fast path     torch's embedding; of a quantized table, the rows alone are dequantized; one in parts is gathered
    transforms    every one; where a half-precision table is trained inside a transform, or compiled, the whole table is
                  cast to fp32 instead of its rows
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.kernels.functorch_state import in_transform_or_compile, is_differentiated
from fgpt.kernels.precision import accumulates_in_half
from fgpt.kernels.quantized_linear import FrozenMatrix, gather_matrix, quantized_embedding
from fgpt.kernels.sharded_parameter import ShardedParameter, gather


def reference(tokens: Int[Tensor, "*batch"], w: Float[Tensor, "vocab d"]) -> Float[Tensor, "*batch d"]:
    """The definition."""
    return w[tokens]


def embedding(
    tokens: Int[Tensor, "*batch"], w: Float[Tensor, "vocab d"] | FrozenMatrix | ShardedParameter
) -> Float[Tensor, "*batch d"]:
    """W[tokens] in the dtype of W."""
    w = gather(w) if isinstance(w, ShardedParameter) else gather_matrix(w)
    if not isinstance(w, Tensor):
        return quantized_embedding(w, tokens)
    if not (accumulates_in_half(w) and is_differentiated(w)):
        return F.embedding(tokens, w)
    if in_transform_or_compile():  # the number of different tokens depends on the data: no transform can follow it
        return F.embedding(tokens, w.float()).to(w.dtype)
    present, indices = torch.unique(tokens, return_inverse=True)
    return F.embedding(indices, F.embedding(present, w).float()).to(w.dtype)
