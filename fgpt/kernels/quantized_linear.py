"""Frozen matrices in 4 or 8 bits, and products with them.

    Blockwise4bit   W_ij = code[c_ij] · absmax of its block of 64    0.516 bytes an element, doubly quantized
    Blockwise8bit   W_ij = code[c_ij] · absmax of its block          1.063
    RowwiseInt8     W_ij = c_ij / 127 · absmax_i                     1 + 4 / in
    Rotated         W = Q R, with Q in one of these and R a rotation, see `fgpt.kernels.hadamard`

A product dequantizes the matrix, multiplies, and frees it; the backward dequantizes it again instead of saving it. With
`RowwiseInt8` the forward product is an int8 matmul: each row of x is rounded to 8 bits as the rows of W are, with a
relative error of about 1 % in y. Its derivatives, of every order, are those of x Wᵀ with the dequantized W (straight
through the rounding). On a CPU with bf16 matmuls they are computed in bf16: W's integers are exact in bf16, so only the
gradient is rounded, to 8 bits, and the error is a third of y's. Elsewhere they are exact.

    x Wᵀ = (x R) Qᵀ        g W = (g Q) R

of a rotated matrix: rows of x and W without outliers are rounded to 8 bits with a smaller error, and the product is the
same. Whoever reads x, such as an adapter, or the norms of W's rows knows nothing of R.

A matrix of any format, or of none, may be in parts on several processes, see `fgpt.kernels.sharded_matrix`: its product
gathers it first, and frees it likewise, or gathers what each process has multiplied with its part.

    reference     what a matrix means: codes times scales, in fp32
    fast path     dequantize and multiply, or an int8 matmul; on CUDA a few rows by a kernel that reads 4-bit codes
    transforms    a product is linear in x, so each derivative is another product: grad and jvp of every order pass, and
                  vmap folds its axis into the rows of x. W has no gradient, and vmap over W raises InputError. Compiled
                  under vmap or jvp it is a product with the dequantized matrix

Source: Dettmers et al. 2023 (QLoRA), section 3; Dettmers et al. 2022 (8-bit optimizers), section 2; Dettmers et al.
2022 (LLM.int8()), section 3.1; Ashkboos et al. 2024 (QuaRot), section 4. The operators are bitsandbytes'.
"""

from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from jaxtyping import Int8 as SInt8
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fgpt.errors import InputError
from fgpt.kernels import hadamard
from fgpt.kernels.bitsandbytes_ops import dynamic_code, register
from fgpt.kernels.chunks import chunk_size
from fgpt.kernels.functorch_state import is_undisturbed, needs_higher_order
from fgpt.kernels.gemv import MAX_ROWS, dense_linear
from fgpt.kernels.hadamard import rotate
from fgpt.kernels.onednn_linear import input_grad
from fgpt.kernels.sharded_matrix import (
    Sharded,
    gather_columns,
    gather_rows,
    local_part,
    part_columns,
    sum_over_parts,
)
from fgpt.tree import node, static

BLOCK = 64
"""Elements that share a scale: a divisor of every GPT's widths, so that a row is a multiple of blocks."""
SCALES_BLOCK = 256
"""Scales that share a scale, if the scales are quantized too."""
HAS_BF16_MATMUL = torch.cpu._is_avx512_bf16_supported()
"""Whether this CPU has bf16 matmuls, which take half the time of fp32."""
IN_BF16 = (torch.float32, torch.bfloat16)
"""The dtypes whose int8 derivatives are then computed in bf16: other dtypes have more digits."""

CHUNK = 1 << 16
"""Elements quantized to 4 bits at once on a CPU: bitsandbytes' operator there needs 25 bytes for each, and is several
times faster if they fit a cache."""

Format: TypeAlias = Literal["nf4", "fp4", "int8", "blockwise8"]


@node
class Blockwise8bit:
    """A tensor as indices into a code of 256 values, times the largest magnitude of their block."""

    codes: UInt8[Tensor, "*size"]
    absmax: Float[Tensor, " blocks"]
    code: Float[Tensor, "256"]
    block: int = static(default=BLOCK)
    dtype: torch.dtype = static(default=torch.float32)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


@node
class Blockwise4bit:
    """A matrix as indices into a code of 16 values, two to a byte (the first in the high half), times the largest
    magnitude of their block. The scales may be quantized in turn, as absmax - offset.
    """

    codes: UInt8[Tensor, "out half_in"]
    absmax: Float[Tensor, " blocks"] | Blockwise8bit
    code: Float[Tensor, "16"]
    offset: Float[Tensor, ""] | None = None
    kind: Literal["nf4", "fp4"] = static(default="nf4")
    dtype: torch.dtype = static(default=torch.float32)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], 2 * self.codes.shape[1]))


@node
class RowwiseInt8:
    """A matrix as integers in ±127, scaled by row."""

    codes: SInt8[Tensor, "out in"]
    absmax: Float[Tensor, " out"]
    dtype: torch.dtype = static(default=torch.float32)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


ScaledCodes: TypeAlias = Blockwise4bit | Blockwise8bit | RowwiseInt8


@node
class Rotated:
    """The matrix `base` R, with R the Hadamard rotation by blocks of `block` elements.

    >>> w = quantize_matrix(torch.tensor([[8.0] + 7 * [0.0]]), "int8")
    >>> dequantize(Rotated(w, block=4))
    tensor([[4., 4., 4., 4., 0., 0., 0., 0.]])
    """

    base: ScaledCodes | Sharded
    block: int = static(default=64)

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype


Quantized: TypeAlias = ScaledCodes | Rotated
QUANTIZED = (Blockwise4bit, Blockwise8bit, RowwiseInt8, Rotated)

FrozenMatrix: TypeAlias = Quantized | Sharded
"""A base weight that is no tensor: no derivative reaches it."""
FROZEN = (*QUANTIZED, Sharded)


# ----------------------------------------------------------------------------------------------------------- matrices


def quantize_matrix(w: Float[Tensor, "out in"], to: Format, double_quant: bool = True) -> ScaledCodes:
    """A matrix in 4 or 8 bits.

    Args:
        w: The matrix. Its rows must be a multiple of BLOCK long, except for int8.
        to: The format.
        double_quant: Quantize the scales of a 4-bit format, too.
    """
    register()
    if to == "int8":
        codes, absmax = _round(w)
        return RowwiseInt8(codes, absmax.squeeze(-1), w.dtype)
    if to == "blockwise8":
        return quantize_blockwise(w.contiguous(), BLOCK, w.dtype)
    from bitsandbytes.functional import get_4bit_type

    code: Any = get_4bit_type(to, device=w.device)
    step = max(1, chunk_size(w.device, CHUNK) // w.shape[1])
    chunks: list[Any] = []
    for rows in w.split(step):
        chunks.append(torch.ops.bitsandbytes.quantize_4bit(rows.float().contiguous(), BLOCK, to, torch.uint8))
    codes = torch.cat([codes.flatten() for codes, _ in chunks])
    absmax = torch.cat([absmax.flatten() for _, absmax in chunks])
    plain = Blockwise4bit(codes.view(w.shape[0], -1), absmax, code, None, to, w.dtype)
    return quantize_scales(plain, absmax) if double_quant else plain


def quantize_scales(w: Blockwise4bit, absmax: Float[Tensor, " blocks"]) -> Blockwise4bit:
    """`w` with these scales, in 8 bits about their mean."""
    offset = absmax.mean()
    return replace(w, absmax=quantize_blockwise(absmax - offset, SCALES_BLOCK, torch.float32), offset=offset)


def quantize_blockwise(x: Float[Tensor, "*size"], block: int, dtype: torch.dtype) -> Blockwise8bit:
    """`x` in the dynamic 8-bit code, scaled by blocks of `block` consecutive elements."""
    code = dynamic_code(True, x.device)
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, code, block)
    return Blockwise8bit(codes, absmax, code, block, dtype)


def is_quantized(w: Any) -> bool:
    """Whether `w` is a quantized matrix, or a sharded one whose parts are quantized.

    >>> from fgpt.kernels.sharded_matrix import split_rows
    >>> is_quantized(split_rows(torch.eye(2), rank=0, size=2))
    False
    """
    return isinstance(local_part(w), QUANTIZED)


def gather_matrix(w: Float[Tensor, "out in"] | FrozenMatrix) -> Float[Tensor, "out in"] | Quantized:
    """`w` itself, or the whole of a sharded one: all ranks must call this at the same point of their program."""
    if isinstance(w, Rotated):
        return replace(w, base=gather_base(w))
    return gather_rows(w) if isinstance(w, Sharded) else w


def gather_base(w: Rotated) -> ScaledCodes:
    """Q of a rotated matrix Q R, whole."""
    return gather_rows(w.base) if isinstance(w.base, Sharded) else w.base


def dequantize(w: FrozenMatrix, dtype: torch.dtype | None = None) -> Float[Tensor, "*size"]:
    """The tensor that `w` means, in its own dtype unless another is given."""
    dtype = dtype or w.dtype
    if isinstance(w, Sharded):
        whole = gather_rows(w)
        return whole.to(dtype) if isinstance(whole, Tensor) else dequantize(whole, dtype)
    if isinstance(w, Rotated):
        return rotate(dequantize(w.base, torch.float32), w.block).to(dtype)
    if dtype == torch.float64:  # bitsandbytes' operators leave fp64 unwritten without an error
        return dequantize(w, torch.float32).double()
    if isinstance(w, RowwiseInt8):
        return w.codes.float().mul_((w.absmax / 127)[:, None]).to(dtype)
    if isinstance(w, Blockwise8bit):
        return torch.ops.bitsandbytes.dequantize_blockwise(w.codes, w.absmax, w.code, w.block, dtype)
    return torch.ops.bitsandbytes.dequantize_4bit(
        w.codes.view(-1, 1), scales(w), BLOCK, w.kind, [w.codes.shape[0], 2 * w.codes.shape[1]], dtype
    )


def reference(w: Quantized) -> Float[Tensor, "*size"]:
    """The definition, in fp32."""
    if isinstance(w, Rotated):
        return hadamard.reference(reference(gather_base(w)), w.block)
    if isinstance(w, RowwiseInt8):
        return w.codes.float() * (w.absmax / 127)[:, None]
    indices = w.codes if isinstance(w, Blockwise8bit) else _unpack(w.codes)
    per = w.block if isinstance(w, Blockwise8bit) else BLOCK
    absmax = scales(w).repeat_interleave(per)[: indices.numel()]
    return w.code[indices.long()] * absmax.view(indices.shape)


def scales(w: Blockwise4bit | Blockwise8bit) -> Float[Tensor, " blocks"]:
    """The largest magnitude of each block."""
    if isinstance(w, Blockwise4bit) and isinstance(w.absmax, Blockwise8bit):
        assert w.offset is not None
        return dequantize(w.absmax) + w.offset
    assert isinstance(w.absmax, Tensor)
    return w.absmax


def quantized_embedding(w: Quantized, rows: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
    """The given rows, dequantized; no others are. Plain torch, so that `rows` may be mapped."""
    if isinstance(w, Rotated):
        return rotate(quantized_embedding(gather_base(w), rows), w.block)
    if isinstance(w, RowwiseInt8):
        return (w.codes[rows] * (w.absmax[rows] / 127)[..., None]).to(w.dtype)
    codes, inp = w.codes[rows], w.shape[-1]
    indices = codes if isinstance(w, Blockwise8bit) else _unpack(codes)
    absmax = scales(w).view(w.shape[0], -1)[rows]
    blocks = w.code[indices.long()].unflatten(-1, (-1, inp // absmax.shape[-1])) * absmax[..., None]
    return blocks.flatten(-2).to(w.dtype)


def slice_rows(w: Quantized, rows: slice | Int[Tensor, " _rows"]) -> Quantized:
    """Some rows of a matrix, still quantized."""
    if isinstance(w, Rotated):
        return replace(w, base=slice_rows(gather_base(w), rows))
    if isinstance(w, RowwiseInt8):
        return RowwiseInt8(w.codes[rows], w.absmax[rows], w.dtype)
    absmax = scales(w).view(w.shape[0], -1)[rows].flatten()
    if isinstance(w, Blockwise8bit):
        return Blockwise8bit(w.codes[rows], absmax, w.code, w.block, w.dtype)
    return Blockwise4bit(w.codes[rows], absmax, w.code, None, w.kind, w.dtype)


def _unpack(codes: UInt8[Tensor, "*batch half"]) -> UInt8[Tensor, "*batch whole"]:
    return torch.stack([codes >> 4, codes & 15], -1).flatten(-2)


def _round(x: Float[Tensor, "*batch in"]) -> tuple[SInt8[Tensor, "*batch in"], Float[Tensor, "*batch 1"]]:
    """Each row as integers in units of its largest magnitude / 127; and those magnitudes."""
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True)
    return (x * (127 / absmax.clamp(min=1e-30))).round_().to(torch.int8), absmax


# ----------------------------------------------------------------------------------------------------------- products


def _has_4bit_kernel(x: Tensor, w: Quantized) -> bool:
    """Whether bitsandbytes multiplies with the codes themselves, and so few rows that dequantizing costs more than the
    product. Its kernel is CUDA's: on a CPU the operator dequantizes, as `dequantize` does.
    """
    return (
        isinstance(w, Blockwise4bit)
        and x.device.type == "cuda"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[:-1].numel() <= MAX_ROWS
        and hasattr(torch.ops.bitsandbytes, "gemm_4bit")  # 0.50 and later
    )


def _computes_in_bf16(x: Tensor, w: FrozenMatrix) -> bool:
    """Whether the derivatives of a product with W are computed in bf16."""
    return isinstance(local_part(w), RowwiseInt8) and HAS_BF16_MATMUL and x.dtype in IN_BF16 and x.device.type == "cpu"


def multiply_4bit(x: Float[Tensor, "*batch in"], w: Blockwise4bit) -> Float[Tensor, "*batch out"]:
    """x Wᵀ from the codes, by bitsandbytes' operator."""
    scales, nested = w.absmax, (None, None, None)
    if isinstance(scales, Blockwise8bit):
        scales, nested = scales.absmax, (scales.codes, scales.code, w.offset)
    codes = w.codes.view(-1, 1)
    return torch.ops.bitsandbytes.gemm_4bit(x, codes, list(w.shape), scales, BLOCK, w.kind, None, *nested)


class _Product(torch.autograd.Function):
    """x Wᵀ, or x W if `transposed`; an int8 matmul if `int8` and W is of that format. It is linear in x, so every
    derivative of it is another product. A `bias`, a constant, is added by the operator that multiplies with a sharded
    tensor, as it is with a whole one: in half precision that rounds once. vmap adds it afterwards, to either.
    """

    @staticmethod
    def forward(x: Tensor, w: Tensor | FrozenMatrix, transposed: bool, int8: bool, bias: Tensor | None) -> Tensor:
        if isinstance(w, Tensor):
            return input_grad(x, w) if transposed else dense_linear(x, w, bias)
        if isinstance(w, Sharded):
            if w.gathers == "weights":
                return _Product.forward(x, gather_rows(w), transposed, int8, bias)
            if transposed:
                return sum_over_parts(_Product.forward(part_columns(x, w), w.part, True, False, None), w)
            bias = None if bias is None else part_columns(bias, w)
            return gather_columns(_Product.forward(x, w.part, False, int8, bias), w)
        if isinstance(w, RowwiseInt8) and int8:
            codes, absmax = _round(x)
            y = torch.ops.bitsandbytes.int8_linear_matmul(codes.reshape(-1, codes.shape[-1]), w.codes).float()
            y = y if x.ndim == 2 else y.view(*x.shape[:-1], w.shape[0])  # a view may not be changed in place
            y = y.mul_(absmax / 127).mul_(w.absmax / 127).to(x.dtype)
            # Compiled by torch 2.11, a result of integers would have no gradient: this one is of x too, plus 0
            return y + (x - x.detach())[..., :1] if torch.compiler.is_compiling() else y
        if _computes_in_bf16(x, w):
            assert isinstance(w, RowwiseInt8)
            codes, row = w.codes.bfloat16(), w.absmax / 127
            y = (x * row).bfloat16() @ codes if transposed else F.linear(x.bfloat16(), codes) * row
            return y.to(x.dtype)
        if _has_4bit_kernel(x, w) and not transposed:
            assert isinstance(w, Blockwise4bit)
            return multiply_4bit(x, w)
        dense = dequantize(w, x.dtype)
        return input_grad(x, dense) if transposed else dense_linear(x, dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.w, ctx.transposed, *_ = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _multiply(g, ctx.w, not ctx.transposed, False), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        x, w, transposed, int8, bias = inputs
        if tree_leaves(in_dims[1]):
            kind = "sharded" if isinstance(w, Sharded) else "quantized"
            raise InputError(f"cannot vmap over {kind} weights: map over the adapters and the examples")
        y = _multiply(x if in_dims[0] is None else x.movedim(in_dims[0], 0), w, transposed, int8)
        if bias is None or in_dims[4] is None:
            return y if bias is None else y + bias, 0
        ones = [1] * (y.ndim - 1 - (in_dims[0] is not None))
        return y + bias.movedim(in_dims[4], 0).view(info.batch_size, *ones, -1), 0


class _ProductForward(_Product):
    """The same with a forward mode, which dynamo refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _multiply(t, ctx.w, ctx.transposed, False)


def _multiply(x: Tensor, w: FrozenMatrix, transposed: bool, int8: bool, bias: Tensor | None = None) -> Tensor:
    if not torch.compiler.is_compiling():
        return _ProductForward.apply(x, w, transposed, int8, bias)  # pyright: ignore[reportReturnType]
    # To dynamo the input of torch.func.grad requires no gradient, and it would inline the forward; a view of it does.
    return _Product.apply(x.view_as(x), w, transposed, int8, bias)  # pyright: ignore[reportReturnType]


def quantized_linear(x: Float[Tensor, "*batch in"], w: FrozenMatrix) -> Float[Tensor, "*batch out"]:
    """x Wᵀ in the dtype of x, under every transform. Compiled under vmap or jvp, which dynamo refuses to an
    autograd.Function, autograd saves the dequantized matrix.
    """
    if isinstance(w, Rotated):
        return quantized_linear(rotate_rows(x, w), w.base)
    int8 = isinstance(local_part(w), RowwiseInt8)
    if torch.compiler.is_compiling() and needs_higher_order():
        return F.linear(fake_quantize(x) if int8 else x, dequantize(w, x.dtype))
    return _multiply(x, w, False, int8)


def rotate_rows(x: Float[Tensor, "*batch in"], w: Rotated) -> Float[Tensor, "*batch in"]:
    """x R: in bf16 if the product with `w` has no more digits."""
    in_bf16 = _computes_in_bf16(x, w.base)
    return rotate(x, w.block, torch.bfloat16 if in_bf16 else None)


def frozen_product(
    x: Float[Tensor, "*batch in"], w: Float[Tensor, "out in"] | FrozenMatrix, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + bias, of a matrix in any format."""
    if isinstance(w, Tensor):
        return dense_linear(x, w, bias)
    if bias is not None and not is_quantized(w):
        y, constant = _multiply(x, w, False, False, bias.detach()), is_undisturbed(bias)
        return y if constant else y + (bias - bias.detach())  # 0, with the derivatives of the bias
    y = quantized_linear(x, w)
    return y if bias is None else y + bias


def linear_input_grad(
    g: Float[Tensor, "*batch out"], w: Float[Tensor, "out in"] | FrozenMatrix
) -> Float[Tensor, "*batch in"]:
    """g W: the gradient of x Wᵀ in x."""
    if isinstance(w, Rotated):
        return rotate_rows(linear_input_grad(g, w.base), w)
    return input_grad(g, w) if isinstance(w, Tensor) else _multiply(g, w, True, False)


def fake_quantize(x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
    """x as an int8 matmul sees it, with the derivative of x itself."""
    codes, absmax = _round(x.detach())
    return x + ((codes * (absmax / 127)).to(x.dtype) - x).detach()
