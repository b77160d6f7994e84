"""Frozen matrices in 4 or 8 bits, and products with them.

    FourBit      W_ij = code[c_ij] · absmax of the block of 64 that ij is in    0.516 bytes a number, doubly quantized
    Blockwise8   W_ij = code[c_ij] · absmax of the block that ij is in          1.063
    Rowwise8     W_ij = c_ij / 127 · absmax_i                                   1 + 4 / in

A product expands the matrix, multiplies, and lets it go; the backward expands it again instead of keeping it. With
`Rowwise8` the forward product is one of whole numbers: each row of x is rounded to 8 bits as the rows of W are, which
costs a relative error of about 1 % in y. Its derivatives, of every order, are those of x Wᵀ with the expanded W
(straight through the rounding). On a CPU that multiplies bf16 they do so in it: W's whole numbers are bf16 numbers, so
that a gradient is rounded, to 8 bits, and the matrix is not, and the error is a third of y's. Elsewhere they are exact.

Source: Dettmers et al. 2023 (QLoRA), section 3; Dettmers et al. 2022 (8-bit optimizers), section 2; Dettmers et al.
2022 (LLM.int8()), section 3.1. The operators are bitsandbytes'.
"""

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from jaxtyping import Int8 as SInt8
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fgpt.errors import InputError
from fgpt.kernels.bitsandbytes_ops import dynamic_code, register
from fgpt.kernels.functorch_state import needs_higher_order
from fgpt.tree import node, static

BLOCK = 64
"""Numbers that share a scale: a divisor of every GPT's widths, so that a row is whole blocks."""
SCALES_BLOCK = 256
"""Scales that share a scale, where the scales are quantized too."""
MULTIPLIES_BF16 = torch.cpu._is_avx512_bf16_supported()
"""Whether this CPU multiplies bf16, which takes half the time that fp32 does."""
IN_BF16 = (torch.float32, torch.bfloat16)
"""The dtypes whose derivatives over whole numbers are then multiplied so: the others ask for more digits."""

PIECE = 1 << 16
"""Numbers that are quantized to 4 bits at once: bitsandbytes' operator on a CPU takes 25 bytes for each, and is several
times faster where they fit a cache."""

Format: TypeAlias = Literal["nf4", "fp4", "int8", "blockwise8"]


@node
class Blockwise8bit:
    """Numbers as indices into a code of 256 values, times the largest magnitude of their block."""

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
    """A matrix as whole numbers in ±127, scaled by row."""

    codes: SInt8[Tensor, "out in"]
    absmax: Float[Tensor, " out"]
    dtype: torch.dtype = static(default=torch.float32)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


Quantized: TypeAlias = Blockwise4bit | Blockwise8bit | RowwiseInt8
QUANTIZED = (Blockwise4bit, Blockwise8bit, RowwiseInt8)


# ----------------------------------------------------------------------------------------------------------- matrices


def quantize_matrix(w: Float[Tensor, "out in"], to: Format, double_quant: bool = True) -> Quantized:
    """`w` in the named format. `in` is a multiple of BLOCK, `int8` apart. `double_quant` quantizes 4-bit scales too."""
    register()
    if to == "int8":
        codes, absmax = _round(w)
        return RowwiseInt8(codes, absmax.squeeze(-1), w.dtype)
    if to == "blockwise8":
        return quantize_blockwise(w.contiguous(), BLOCK, w.dtype)
    from bitsandbytes.functional import get_4bit_type

    code: Any = get_4bit_type(to, device=w.device)
    step = max(1, PIECE // w.shape[1])
    parts = [
        torch.ops.bitsandbytes.quantize_4bit(p.float().contiguous(), BLOCK, to, torch.uint8) for p in w.split(step)
    ]
    codes, absmax = (torch.cat([part.flatten() for part in side]) for side in zip(*parts, strict=True))
    offset = absmax.mean() if double_quant else None
    scales = absmax if offset is None else quantize_blockwise(absmax - offset, SCALES_BLOCK, torch.float32)
    return Blockwise4bit(codes.view(w.shape[0], -1), scales, code, offset, to, w.dtype)


def quantize_blockwise(x: Float[Tensor, "*size"], block: int, dtype: torch.dtype) -> Blockwise8bit:
    """`x` in the dynamic 8-bit code, scaled by blocks of `block` consecutive numbers."""
    code = dynamic_code(True, x.device)
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, code, block)
    return Blockwise8bit(codes, absmax, code, block, dtype)


def dequantize(w: Quantized, dtype: torch.dtype | None = None) -> Float[Tensor, "*size"]:
    """The numbers that `w` means, in its own dtype unless another is given."""
    dtype = dtype or w.dtype
    if dtype == torch.float64:  # bitsandbytes' operators write no doubles, and do not say so
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
    if isinstance(w, RowwiseInt8):
        return w.codes.float() * (w.absmax / 127)[:, None]
    indices = w.codes if isinstance(w, Blockwise8bit) else _unpacked(w.codes)
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
    """The chosen rows, the others staying as they are. Plain torch, so that `rows` may be mapped."""
    if isinstance(w, RowwiseInt8):
        return (w.codes[rows] * (w.absmax[rows] / 127)[..., None]).to(w.dtype)
    codes, inp = w.codes[rows], w.shape[-1]
    indices = codes if isinstance(w, Blockwise8bit) else _unpacked(codes)
    absmax = scales(w).view(w.shape[0], -1)[rows]
    blocks = w.code[indices.long()].unflatten(-1, (-1, inp // absmax.shape[-1])) * absmax[..., None]
    return blocks.flatten(-2).to(w.dtype)


def slice_rows(w: Quantized, rows: slice) -> Quantized:
    """Some consecutive rows of a matrix, still quantized."""
    if isinstance(w, RowwiseInt8):
        return RowwiseInt8(w.codes[rows], w.absmax[rows], w.dtype)
    absmax = scales(w).view(w.shape[0], -1)[rows].flatten()
    if isinstance(w, Blockwise8bit):
        return Blockwise8bit(w.codes[rows], absmax, w.code, w.block, w.dtype)
    return Blockwise4bit(w.codes[rows], absmax, w.code, None, w.kind, w.dtype)


def _unpacked(codes: UInt8[Tensor, "*batch half"]) -> UInt8[Tensor, "*batch whole"]:
    return torch.stack([codes >> 4, codes & 15], -1).flatten(-2)


def _round(x: Float[Tensor, "*batch in"]) -> tuple[SInt8[Tensor, "*batch in"], Float[Tensor, "*batch 1"]]:
    """Each row in whole numbers of its largest magnitude / 127."""
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True)
    return (x * (127 / absmax.clamp(min=1e-30))).round_().to(torch.int8), absmax


# ----------------------------------------------------------------------------------------------------------- products


class _Product(torch.autograd.Function):
    """x Wᵀ, or x W where `transposed`; `whole` multiplies in whole numbers. Linear in x, so every derivative of it is
    another product.
    """

    @staticmethod
    def forward(x: Tensor, w: Quantized, transposed: bool, whole: bool) -> Tensor:
        if isinstance(w, RowwiseInt8) and whole:
            codes, absmax = _round(x)
            y = torch.ops.bitsandbytes.int8_linear_matmul(codes.reshape(-1, codes.shape[-1]), w.codes).float()
            y = y if x.ndim == 2 else y.view(*x.shape[:-1], w.shape[0])  # what is a view may not be written over
            return y.mul_(absmax / 127).mul_(w.absmax / 127).to(x.dtype)
        if isinstance(w, RowwiseInt8) and MULTIPLIES_BF16 and x.dtype in IN_BF16 and x.device.type == "cpu":
            codes, row = w.codes.bfloat16(), w.absmax / 127
            y = (x * row).bfloat16() @ codes if transposed else F.linear(x.bfloat16(), codes) * row
            return y.to(x.dtype)
        dense = dequantize(w, x.dtype)
        return x @ dense if transposed else F.linear(x, dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.w, ctx.transposed, _ = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _multiply(g, ctx.w, not ctx.transposed, False), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        x, *others = inputs
        if in_dims[0] is None or tree_leaves(in_dims[1]):
            raise InputError("cannot vmap over quantized weights: map over the adapters and the rows")
        return _multiply(x.movedim(in_dims[0], 0), *others), 0


class _ProductForward(_Product):
    """The same with a forward mode, which dynamo refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _multiply(t, ctx.w, ctx.transposed, False)


def _multiply(x: Tensor, w: Quantized, transposed: bool, whole: bool) -> Tensor:
    if not torch.compiler.is_compiling():
        return _ProductForward.apply(x, w, transposed, whole)  # pyright: ignore[reportReturnType]
    # To dynamo the very input of torch.func.grad requires no gradient, and it would inline the forward; a view does.
    return _Product.apply(x.view_as(x), w, transposed, whole)  # pyright: ignore[reportReturnType]


def quantized_linear(x: Float[Tensor, "*batch in"], w: Quantized) -> Float[Tensor, "*batch out"]:
    """x Wᵀ in the dtype of x, under every transform. Compiled under vmap or jvp, which dynamo refuses to an
    autograd.Function, autograd keeps the expanded matrix.
    """
    whole = isinstance(w, RowwiseInt8)
    if torch.compiler.is_compiling() and needs_higher_order():
        return F.linear(fake_quantize(x) if whole else x, dequantize(w, x.dtype))
    return _multiply(x, w, False, whole)


def linear_input_grad(
    g: Float[Tensor, "*batch out"], w: Float[Tensor, "out in"] | Quantized
) -> Float[Tensor, "*batch in"]:
    """g W: the gradient of x Wᵀ in x."""
    return g @ w if isinstance(w, Tensor) else _multiply(g, w, True, False)


def fake_quantize(x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
    """x as a product of whole numbers sees it, with the derivative of x itself."""
    codes, absmax = _round(x.detach())
    return x + ((codes * (absmax / 127)).to(x.dtype) - x).detach()
