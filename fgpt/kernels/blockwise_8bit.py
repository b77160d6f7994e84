"""Tensors as block-wise 8-bit dynamic codes, through bitsandbytes' raw operators: x_i ≈ absmax[i // 256] · code[k_i].

Each block of 256 elements, in memory order, is scaled by its largest magnitude; k_i is the index of the nearest of the
256 values of the dynamic code, which reach from 1 down to 5.5e-7 (3.3e-7 unsigned) and 0.

    blocks = F.pad(x.flatten(), (0, -x.numel() % 256)).view(-1, 256)             # the reference
    absmax = blocks.abs().amax(1, keepdim=True)
    k = torch.bucketize(blocks / absmax, (code[1:] + code[:-1]) / 2)
    x ≈ code[k] * absmax

    fast path     bitsandbytes' operators, and on a CPU a search for the codes of small elements
    transforms    vmap gives each example blocks of its own; grad and jvp raise InputError, as rounding has no
                  derivative

One exception: with the unsigned code a positive element never becomes 0. Adam divides by √v, and a v that is rounded to
0 makes a step of m̂/ε, hundreds of learning rates long if a small gradient is followed by none.

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", sections 1.3 and 2.1.
"""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.bitsandbytes_ops import dynamic_code
from fgpt.kernels.cuda_graphs import is_capturing

BLOCK = 256
SMALL = 1e-4
"""An element below this fraction of its block's largest magnitude is quantized here on the CPU: see `_nearest`."""


def quantize(
    x: Float[Tensor, "*shape"], signed: bool = True
) -> tuple[UInt8[Tensor, "*shape"], Float32[Tensor, " blocks"]]:
    """The codes of `x` and the largest magnitude of each block; `signed=False` has finer codes for x >= 0.

    Raises InputError in the capture of a CUDA graph: bitsandbytes' kernel takes no stream, so a graph would miss it.
    """
    if is_capturing():
        raise InputError(
            "quantization to 8 bits in the capture of a CUDA graph, which would leave it out: capture a step of "
            "fgpt.adamw, or run adamw8bit outside of graphs"
        )
    return _Quantize.apply(x.float(), dynamic_code(signed, x.device))  # pyright: ignore[reportReturnType]


def dequantize(
    codes: UInt8[Tensor, "*shape"], absmax: Float32[Tensor, " blocks"], signed: bool = True
) -> Float32[Tensor, "*shape"]:
    """absmax[i // 256] · code[k_i]."""
    return _Dequantize.apply(codes, absmax, dynamic_code(signed, codes.device))  # pyright: ignore[reportReturnType]


def _nearest(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes, also for elements that bitsandbytes' CPU operator (0.50) rounds to other codes.

    Its table of x / absmax has 65,536 equal steps over [-1, 1], too coarse for the code's small values: 0 and anything
    under 3e-5 become +2.1e-5 (1.6e-5 unsigned), so a weight without a gradient would drift. Its CUDA operator searches
    for the nearest.
    """
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, code, BLOCK)
    if x.device.type != "cpu":
        return codes, absmax
    flat = x.flatten()
    scale = absmax.repeat_interleave(BLOCK)[: flat.numel()]
    small = (flat.abs() < SMALL * scale).nonzero().squeeze(1)
    nearest = torch.bucketize(flat[small] / scale[small], (code[1:] + code[:-1]) / 2)
    return codes.flatten().index_copy(0, small, nearest.to(torch.uint8)).view_as(codes), absmax


class _Blockwise(torch.autograd.Function):
    """Rounding has no derivative, and vmap flattens its axis into more blocks: the same in both directions."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise InputError("8-bit moments are rounded, which has no derivative: differentiate steps of fgpt.adamw")

    jvp = backward


class _Quantize(_Blockwise):
    @staticmethod
    def forward(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        codes, absmax = _nearest(x, code)
        return codes + ((codes == 0) & (x > 0)), absmax  # signed, code 0 is -0.993: no positive element has it

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Tensor) -> Any:
        x, code = args
        x = x.movedim(in_dims[0], 0)
        codes, absmax = _Quantize.apply(_whole_blocks(x), code)  # pyright: ignore[reportGeneralTypeIssues]
        return (codes[:, : x[0].numel()].reshape(x.shape), absmax.view(len(x), -1)), (0, 0)


class _Dequantize(_Blockwise):
    @staticmethod
    def forward(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
        return torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, BLOCK, torch.float32)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Tensor) -> Any:
        codes, absmax = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:2], in_dims[:2], strict=True)
        )
        x: Any = _Dequantize.apply(_whole_blocks(codes), absmax.flatten(), args[2])
        return x[:, : codes[0].numel()].reshape(codes.shape), 0


def _whole_blocks(x: Tensor) -> Tensor:
    """One row for each example, padded to whole blocks, so that no block spans two examples."""
    rows = x.flatten(1)
    return F.pad(rows, (0, -rows.shape[1] % BLOCK))
