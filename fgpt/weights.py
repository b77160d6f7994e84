"""The weight algebra. A weight is a tensor, a quantized matrix or an adapted weight; it has one meaning, `dense`, and
one fast reading, `linear`:

    linear(x, w) == x @ dense(w).T

    Adapted:  W' = diag(row) · (W + s·B·A) · diag(col)

One normal form holds every adapter of the family: LoRA is s·B·A; DoRA sets row = m / ‖W + s·B·A‖ beside it; IA3 is row
or col alone. An adapted weight holds another weight, so adapters stack with no further code. Weights are [out, in]
everywhere.
"""

from typing import Any, TypeAlias, Union

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.kernels import gemv, grad_only_linear
from fgpt.kernels.dropout import dropout
from fgpt.kernels.functorch_state import in_transform_or_compile, is_differentiated
from fgpt.kernels.quantized_linear import QUANTIZED, Quantized, base_linear, dequantize, embedding, slice_rows
from fgpt.kernels.scaled_linear import can_reconstruct, fused_scaled_linear, scale_rows
from fgpt.tree import children, node, static

CHUNK = 1 << 18
"""Numbers of a frozen matrix expanded at once where its row norms are taken: 1 MB of fp32, read twice from cache."""


@node
class Adapted:
    """A frozen weight moved within the span of a rank-r product, and scaled by row and by column; what is None does
    nothing. `seed` draws the dropout of the input of A, in the factored reading alone.

    Source: Hu et al. 2021 (LoRA), section 4.1; Liu et al. 2024 (DoRA), section 4.1; Liu et al. 2022 (IA3), section 3.3.
    """

    base: "Weight"
    a: Float[Tensor, "rank in"] | None = None
    b: Float[Tensor, "out rank"] | None = None
    row: Float[Tensor, " out"] | None = None
    col: Float[Tensor, " in"] | None = None
    seed: Int[Tensor, ""] | None = None
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)


Weight: TypeAlias = Union[Tensor, Quantized, Adapted]


def parameters(tree: Any) -> int:
    """How many parameters a model has: a quantized matrix has out times in, in however many bytes it is held."""
    if isinstance(tree, Tensor):
        return tree.numel()
    if isinstance(tree, QUANTIZED):
        return tree.shape.numel()
    return sum(parameters(child) for _, child in children(tree))


def dense(w: Weight) -> Float[Tensor, "out in"]:
    """The merged reading: the one matrix that `w` means."""
    if isinstance(w, Tensor):
        return w
    if isinstance(w, QUANTIZED):
        return dequantize(w)
    m = dense(w.base)
    if w.a is not None and w.b is not None:
        m = m + w.scale * (w.b @ w.a)
    if w.row is not None:
        m = w.row[:, None] * m
    return (m if w.col is None else m * w.col).to(dtype(w))


def linear(
    x: Float[Tensor, "*batch in"], w: Weight, bias: Float[Tensor, " out"] | None = None, read: bool = True
) -> Float[Tensor, "*batch out"]:
    """The factored reading: row ⊙ (W (col ⊙ x) + s B A (col ⊙ x)) + bias, never forming B·A or a scaled W.

    Where it is not `read`, its gradient is all that is wanted, by plain autograd: the value may be anything.
    """
    if not isinstance(w, Adapted):
        if not read:
            y = grad_only_linear.grad_only_linear(x, w)
        elif isinstance(w, Tensor) and gemv.use_gemv(x):
            y = gemv.gemv(x, w)
        else:
            return base_linear(x, w, bias)
        return y if bias is None else y + bias
    x = x if w.col is None else x * w.col.to(x.dtype)
    rows, batch = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    if w.row is not None and not isinstance(w.base, Adapted) and can_reconstruct(w.row):
        row, bias = w.row.to(x.dtype), None if bias is None else bias.to(x.dtype)
        a, b = (None if t is None else t.to(x.dtype) for t in (w.a, w.b))
        return fused_scaled_linear(rows, lora_input(rows, w), w.base, row, bias, a, b, w.scale).view(*batch, len(row))
    read = read or w.row is not None  # the gradient of a scale reads what it scales
    y = linear(rows, w.base, bias, read)
    if w.a is not None and w.b is not None:
        low, up = lora_down(x, w).reshape(-1, w.b.shape[1]), w.b.to(y.dtype)
        # Nobody else reads a frozen matrix's product, and autograd lets it be written over, as one of rows is no view.
        own = read and not isinstance(w.base, Adapted) and not in_transform_or_compile()
        y = (y.addmm_ if own else y.addmm)(low, up.T)
    y = y if w.row is None else scale_rows(y, w.row.to(y.dtype), None if bias is None else bias.to(y.dtype))
    return y.view(*batch, y.shape[1])


def lora_input(x: Float[Tensor, "*batch in"], w: Adapted) -> Float[Tensor, "*batch in"]:
    """x as A sees it: after dropout."""
    return x if w.seed is None else dropout(x, w.seed, w.dropout)


def lora_down(x: Float[Tensor, "*batch in"], w: Adapted) -> Float[Tensor, "*batch rank"]:
    """s A x."""
    assert w.a is not None
    return w.scale * F.linear(lora_input(x, w), w.a.to(x.dtype))


def linear_terms(x: Float[Tensor, "*batch in"], w: Weight) -> list[tuple[Tensor, Tensor]]:
    """The factored reading, undone: pairs (x_j, W_j) with x dense(w)ᵀ = Σ_j x_j W_jᵀ, the frozen weight first. One that
    is scaled by row, or quantized, is no such sum, and is merged.
    """
    if isinstance(w, Tensor):
        return [(x, w)]
    if isinstance(w, QUANTIZED) or w.row is not None:
        return [(x, dense(w).to(x.dtype))]
    x = x if w.col is None else x * w.col.to(x.dtype)
    frozen = linear_terms(x, w.base)
    return frozen if w.a is None or w.b is None else [*frozen, (lora_down(x, w), w.b.to(x.dtype))]


def embed(tokens: Int[Tensor, "*batch"], w: Weight) -> Float[Tensor, "*batch in"]:
    """Rows of `w`: dense(w)[tokens]. An adapter on a tied table thus moves embedding and head together.

    On a CPU torch sums the gradients of a token's places in the table's dtype, in bf16 3 % off over 1,000 of them and
    32 % over 4,096: of a table that is trained, rows are read once there, and repeated in fp32.
    """
    if isinstance(w, Tensor):
        if not (accumulates_in_half(w) and is_differentiated(w)):
            return F.embedding(tokens, w)
        if in_transform_or_compile():  # how many differ, no transform can say
            return F.embedding(tokens, w.float()).to(w.dtype)
        seen, places = torch.unique(tokens, return_inverse=True)
        return F.embedding(places, F.embedding(seen, w).float()).to(w.dtype)
    if isinstance(w, QUANTIZED):
        return embedding(w, tokens)
    rows = embed(tokens, w.base)
    if w.a is not None and w.b is not None:
        rows = rows + w.scale * (embed(tokens, w.b) @ w.a).to(rows.dtype)
    if w.row is not None:
        rows = rows * w.row[tokens][..., None].to(rows.dtype)
    return rows if w.col is None else rows * w.col.to(rows.dtype)


def accumulates_in_half(x: Tensor) -> bool:
    """Whether torch's kernels of embedding and LayerNorm sum the gradients of what is trained in the dtype of `x`."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def row_norms(
    w: Weight, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"], scale: float
) -> Float[Tensor, " out"]:
    """‖w_i + s b_i A‖ for every row i, with neither B·A nor a whole fp32 copy of W:

    ‖w_i + s b_i A‖² = ‖w_i‖² + b_i · (2s A w_iᵀ + s² A Aᵀ b_iᵀ)
    """
    squares, cross = row_sq_and_cross(w, a)
    moved = squares + torch.linalg.vecdot(b, torch.addmm(cross, b, a @ a.T, beta=2 * scale, alpha=scale**2))
    # Where V nearly cancels W the sum is rounding, and may be negative: the floor is what fp32 can tell of it.
    return torch.maximum(moved, torch.finfo(moved.dtype).eps * squares).sqrt()


def row_sq_and_cross(w: Weight, a: Float[Tensor, "rank in"]) -> tuple[Float[Tensor, " out"], Float[Tensor, "out rank"]]:
    """(‖w_i‖², w_i Aᵀ) for every row i, in the dtype of A."""

    def plain(m: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.vector_norm(m, dim=-1).square(), F.linear(m, a)

    if isinstance(w, Tensor) and w.dtype == a.dtype:
        return plain(w)
    if not isinstance(w, Adapted):
        out, inp = shape(w)
        step = max(1, CHUNK // inp)
        parts = [plain(_rows(w, slice(i, i + step), a.dtype)) for i in range(0, out, step)]
        return torch.cat([squares for squares, _ in parts]), torch.cat([cross for _, cross in parts])
    if w.col is not None:  # the columns' scales mix with W's: no Gram matrix of W alone says how
        m = dense(w).to(a.dtype)
        return m.square().sum(-1), m @ a.T
    if w.a is None or w.b is None:
        squares, cross = row_sq_and_cross(w.base, a)
    else:
        _, inner = row_sq_and_cross(w.base, torch.cat([w.a, a]))
        cross = inner[:, len(w.a) :] + w.scale * w.b @ (w.a @ a.T)
        squares = row_norms(w.base, w.a, w.b, w.scale).square()
    return (squares, cross) if w.row is None else (w.row**2 * squares, w.row[:, None] * cross)


def _rows(w: Tensor | Quantized, rows: slice, dtype: torch.dtype) -> Float[Tensor, "rows in"]:
    return w[rows].to(dtype) if isinstance(w, Tensor) else dequantize(slice_rows(w, rows), torch.float32).to(dtype)


def shape(w: Weight) -> tuple[int, int]:
    """(out, in)."""
    return shape(w.base) if isinstance(w, Adapted) else (w.shape[0], w.shape[1])


def dtype(w: Weight) -> torch.dtype:
    """The dtype of the frozen weight at the bottom, which activations share."""
    return dtype(w.base) if isinstance(w, Adapted) else w.dtype
