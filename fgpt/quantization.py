"""Quantizing a params tree: one more transform of it."""

from typing import Any, TypeVar, get_args

from torch import Tensor

from fgpt.adapters import weight_matrices
from fgpt.errors import InputError
from fgpt.kernels.quantized_linear import BLOCK, Format, Quantized, quantize_matrix
from fgpt.tree import replace_at, select
from fgpt.weights import Weight

T = TypeVar("T")


def quantize(params: T, format: Format = "nf4", double_quant: bool = True, target: str = r"blocks\..*") -> T:
    """`params` with the weight of every layer whose path matches `target` in full held in 4 or 8 bits.

    nf4, fp4: 16 values fit to normal numbers, or floats, scaled by blocks of 64; `double_quant` holds the scales in
    8 bits too: 0.516 bytes a number. blockwise8: the dynamic code of 256 values. int8: whole numbers scaled by row,
    whose products are whole too: small, and on a CPU with 8-bit dot products the fastest of all.

    Raises InputError where `target` matches nothing, or a weight that is adapted, quantized already, or too small.
    """
    weights = weight_matrices(params)
    return replace_at(
        params,
        {f"{path}.w": quantize_weight(path, weights[path], format, double_quant) for path in select(weights, target)},
    )


def quantize_weight(path: str, w: Weight, to: Any, double_quant: bool = True) -> Quantized:
    """The weight of the layer at `path`, quantized. Raises InputError as `quantize` does."""
    if to not in get_args(Format):
        raise InputError(f"quantize to {to!r}: expected one of {', '.join(get_args(Format))}")
    if not isinstance(w, Tensor):
        raise InputError(f"{path} is {type(w).__name__} already: quantize a plain params tree, then adapt it")
    if to != "int8" and w.shape[1] % BLOCK:
        raise InputError(f"{path} has rows of {w.shape[1]}: {to} wants multiples of {BLOCK}; narrow the target")
    return quantize_matrix(w, to, double_quant)
