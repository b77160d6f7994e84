"""Quantization as a transform of the params tree."""

from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from fgpt.errors import InputError, check_choice
from fgpt.kernels.hadamard import MIN_BLOCK, hadamard_block
from fgpt.kernels.hadamard import rotate as rotate_rows
from fgpt.kernels.quantized_linear import BLOCK, Format, Quantized, Rotated, quantize_matrix
from fgpt.layers import weight_matrices
from fgpt.tree import replace_at, select
from fgpt.weights import Weight

T = TypeVar("T")


def quantize(
    params: T,
    format: Format = "nf4",
    *,
    double_quant: bool = True,
    rotate: bool = False,
    target: str = r"blocks\..*",
) -> T:
    r"""`params` with the weights of some layers quantized to 4 or 8 bits, on the device that they are on. Two devices
    give the same codes, but for elements that lie to rounding halfway between two.

    Args:
        params: A plain params tree; adapt it after quantization.
        format: nf4 (16 quantiles of the normal distribution) and fp4 (4-bit floats) have a scale for each block of 64
            elements; blockwise8 is the dynamic code of 256 values; int8 has a scale for each row, and its matmul is an
            int8 matmul: on a CPU with 8-bit dot products the fastest of all.
        double_quant: Quantize the scales of nf4 and fp4 to 8 bits too: 0.516 bytes for each element.
        rotate: Quantize W R in place of W, and give it x R in place of x, with R a Hadamard rotation by blocks of 64
            elements, or of the largest power of two that divides a row: outliers are spread over their block. With int8
            the loss of SmolLM2-135M grows by 0.1 to 0.2 % in place of 0.9 to 1.4, and a LoRA step takes 1.07 of its
            time. nf4 gains nothing from it.
        target: A regular expression; layers whose whole path matches it are quantized.

    Raises:
        InputError: if `target` matches nothing, or a weight that is adapted, quantized already, or has rows that do
            not divide into blocks.

    Source: Dettmers et al. 2023 (QLoRA), section 3; Ashkboos et al. 2024 (QuaRot), section 4, for `rotate`.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=64, n_ctx=16, vocab_size=11, d_mlp=64)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> type(fgpt.quantize(params, "int8", target=r".*\.mlp\..*").blocks[0].mlp.up.w).__name__
    'RowwiseInt8'
    """
    weights = weight_matrices(params)
    quantized: dict[str, Quantized] = {}
    for path in select(weights, target):
        quantized[f"{path}.w"] = quantize_weight(path, weights[path], format, double_quant, rotate)
    return replace_at(params, quantized)


def quantize_weight(path: str, w: Weight, format: Any, double_quant: bool = True, rotate: bool = False) -> Quantized:
    """The weight of the layer at `path`, quantized. Raises InputError as `quantize` does."""
    check_choice("format", format, Format)
    if not isinstance(w, Tensor):
        raise InputError(f"{path} is {type(w).__name__} already: quantize a plain params tree, then adapt it")
    if format != "int8" and w.shape[1] % BLOCK:
        raise InputError(
            f"{path} has rows of {w.shape[1]} elements: {format} needs a multiple of {BLOCK}; narrow the target"
        )
    if not rotate:
        return quantize_matrix(w, format, double_quant)
    block = hadamard_block(w.shape[1])
    if block is None:
        raise InputError(
            f"{path} has rows of {w.shape[1]} elements: a rotation needs a multiple of {MIN_BLOCK}; quantize it "
            "without one, or narrow the target"
        )
    rotated = quantize_matrix(rotate_rows(w.float(), block), format, double_quant)
    return Rotated(replace(rotated, dtype=w.dtype), block)
