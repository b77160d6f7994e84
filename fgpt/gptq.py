r"""Quantization that makes up for its own error: each rounding moves the weights that are not yet rounded, by what a
few texts say of the layer's inputs.

    min_Q ‖X Wᵀ - X̂ Qᵀ‖²        x the layer's input in the model, x̂ in the model whose earlier layers are quantized

With H = Σ x̂ x̂ᵀ it is a least-squares problem for a weight W*, of which Q is the rounding by the metric of H:

    W* = W + W Σ(x - x̂) x̂ᵀ H⁻¹        min_Q tr (W* - Q) H (W* - Q)ᵀ

Columns are rounded one after the other, those of the largest H_jj first. The error of one is spread over those that
remain, and afterwards each column is rounded anew, the others as they are, a few times over:

    H⁻¹ = UᵀU        q_j = round(w_j)        w_k -= (w_j - q_j) U_jk / U_jj        for k > j
    q_j = round(q_j - ((Q - W*) H)_j / H_jj)

H has λ I added, λ = damping · mean H_jj, which also holds W* near W. Scales are chosen before, from W*: of some
fractions of a block's largest magnitude the one of the least Σ_j H_jj (w_j - q_j)². They are quantized first, too, so
that codes are chosen for the scales that they are multiplied by.

The result is an ordinary matrix of its format: no layout, kernel or file knows of this.

Source: Frantar et al. 2022 (GPTQ), section 3, with the activation order of its code; Behdin et al. 2023 (QuantEase),
section 3, for the second rounding; Arai and Ichikawa 2025 (Quantization Error Propagation) for W*.
"""

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.hadamard import rotate as rotate_rows
from fgpt.kernels.precision import at_least_fp32
from fgpt.kernels.quantized_linear import (
    BLOCK,
    SCALES_BLOCK,
    Blockwise4bit,
    Format,
    Quantized,
    Rotated,
    RowwiseInt8,
    ScaledCodes,
    gather_base,
    quantize_blockwise,
    scales,
)
from fgpt.layer_inputs import input_point, input_rows
from fgpt.layers import weight_matrices
from fgpt.losses import Batch, text_positions
from fgpt.model import GPT, Block, BlockFunction, Tap, block_functions
from fgpt.model.taps import tap_points
from fgpt.quantization import quantize_weight
from fgpt.tree import replace_at, select
from fgpt.weights import Weight, dense

SCALE_FRACTIONS = (1.0, 0.95, 0.9, 0.85)
"""Of a block's largest magnitude: the scales that are tried."""
COLUMNS = 64
"""Columns whose errors are gathered before the rest of the matrix changes: a matrix product in place of rank-one
updates. The result is the same."""


@torch.no_grad()
def quantize_gptq(
    params: GPT,
    batches: Iterable[Batch],
    format: Format = "nf4",
    *,
    double_quant: bool = True,
    rotate: bool = False,
    target: str = r"blocks\..*",
    damping: float = 0.01,
    sweeps: int = 2,
) -> GPT:
    r"""`params` with the weights of some layers quantized, as `fgpt.quantize` does, but so that the layers' outputs on
    some texts change least.

    Block after block, two residual streams of the texts are carried on: that of `params`, and that of the blocks as
    they are quantized so far.

    Args:
        params: A plain params tree; adapt it after quantization.
        batches: Texts of the kind that the model is for, with at least as many positions as a layer has inputs; some
            ten times as many are worth it. The two streams of all of them are in memory, a block's activations of one.
        format: As of `fgpt.quantize`.
        double_quant: As of `fgpt.quantize`.
        rotate: As of `fgpt.quantize`, for int8.
        target: A regular expression; layers of the blocks whose whole path matches it are quantized.
        damping: What is added to the diagonal of H, as a fraction of its mean.
        sweeps: How often each column is rounded again after the first time.

    Raises:
        InputError: as `fgpt.quantize` does; for a layer outside the blocks; if the texts have fewer positions than a
            layer has inputs; unless damping is positive and `sweeps` 0 or more.

    Source: Frantar et al. 2022 (GPTQ), section 3; the module's docstring has the equations.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=64, n_ctx=64, vocab_size=11, d_mlp=64)
    >>> params, text = fgpt.init(config, fgpt.key(0)), torch.randint(11, (4, 64), generator=fgpt.key(1))
    >>> frozen = fgpt.quantize_gptq(params, [fgpt.Batch(text, text, torch.ones(4, 64))])
    >>> def change(other):
    ...     return float((fgpt.hidden(other, text) - fgpt.hidden(params, text)).norm())
    >>> change(frozen) < 0.8 * change(fgpt.quantize(params))
    True
    """
    if not damping > 0:
        raise InputError(f"damping is {damping:g}: expected a positive fraction, such as 0.01")
    if sweeps < 0:
        raise InputError(f"sweeps is {sweeps}: expected 0 or more")
    matrices = weight_matrices(params)
    paths = select(matrices, target)
    formats = {path: _first_row(path, matrices[path], format, double_quant, rotate) for path in paths}
    readers = _readers(params, paths)
    streams = [_stream(params, batch) for batch in batches]
    _check_enough(streams, {path: formats[path].shape[1] for path in paths})
    result = params
    for i, p in enumerate(params.blocks):
        for point, layers in readers[i].items():
            moments = _moments(streams, i, point, p, result.blocks[i], damping)
            new: dict[str, Quantized] = {}
            for path in layers:
                w = at_least_fp32(dense(matrices[path]))
                new[f"{path}.w"] = quantize_by_moments(w, moments, formats[path], sweeps)
            result = replace_at(result, new)
        streams = [stream.after(i, p, result.blocks[i]) for stream in streams]
    return result


def _first_row(path: str, w: Weight, format: Format, double_quant: bool, rotate: bool) -> Quantized:
    """The matrix's first row in its format: what is known of the result before. Raises InputError as `quantize`."""
    return quantize_weight(path, w[:1] if isinstance(w, Tensor) else w, format, double_quant, rotate)


def _readers(params: GPT, paths: Sequence[str]) -> list[dict[str, list[str]]]:
    """For each block the layers that read the same point, in the order of computation."""
    points, order = {path: input_point(params, path) for path in paths}, tap_points(params)
    readers: list[dict[str, list[str]]] = [{} for _ in params.blocks]
    for path in sorted(paths, key=lambda path: order.index(points[path])):
        i = int(path.split(".")[1])
        readers[i].setdefault(points[path], []).append(path)
    return readers


def _check_enough(streams: Sequence["_Stream"], widths: dict[str, int]) -> None:
    count = sum(int(stream.is_text.sum()) for stream in streams)
    path = max(widths, key=lambda path: widths[path])
    if count < widths[path]:
        raise InputError(
            f"calibration on {count} positions of text, but {path} has {widths[path]} inputs: give batches with at "
            "least as many positions"
        )


# -------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class _Stream:
    """The residual stream of a batch between two blocks: of the model, and of the quantized one."""

    is_text: Bool[Tensor, "*batch seq"]
    functions: list[BlockFunction]
    x: Float[Tensor, "*batch seq d_model"]
    x_quantized: Float[Tensor, "*batch seq d_model"]

    def after(self, i: int, p: Block, p_quantized: Block) -> "_Stream":
        f = self.functions[i]
        return replace(self, x=f(self.x, p), x_quantized=f(self.x_quantized, p_quantized))


def _stream(params: GPT, batch: Batch) -> _Stream:
    x, functions = block_functions(params, batch.tokens, batch.segments, cu_seqlens=batch.cu_seqlens)
    return _Stream(text_positions(batch), functions, x, x)


class Moments(NamedTuple):
    """What the inputs of a layer say of its weight.

    Args:
        h: H = Σ x̂ x̂ᵀ + λ I.
        drift: Σ(x - x̂) x̂ᵀ.
    """

    h: Float[Tensor, "in in"]
    drift: Float[Tensor, "in in"]


def _moments(streams: Sequence[_Stream], i: int, point: str, p: Block, p_quantized: Block, damping: float) -> Moments:
    """Of the inputs at a point of block i."""
    h: Any = 0
    drift: Any = 0
    for stream in streams:
        f = stream.functions[i]
        x = at_least_fp32(_activation(f, stream.x, p, point)[stream.is_text])
        x_quantized = at_least_fp32(_activation(f, stream.x_quantized, p_quantized, point)[stream.is_text])
        h = x_quantized.T @ x_quantized + h
        drift = (x - x_quantized).T @ x_quantized + drift
    return Moments(with_damping(h, damping), drift)


def with_damping(h: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """H + λ I, which has an inverse: an input that is always 0 has a weight that is rounded by itself."""
    mean = h.diagonal().mean()
    return h + torch.where(mean > 0, damping * mean, 1.0) * torch.eye(len(h), dtype=h.dtype, device=h.device)


class _ReachedError(Exception):
    """A block has come to the point that is asked for: the rest of it is not computed."""


def _activation(f: BlockFunction, x: Tensor, p: Block, point: str) -> Float[Tensor, "*batch seq in"]:
    """What layers read at a point inside a block."""
    activations: list[Tensor] = []

    def stop(point: str, activation: Tensor) -> Tensor:
        activations.append(input_rows(point, activation))
        raise _ReachedError

    with contextlib.suppress(_ReachedError):
        f(x, p, Tap(stop, re.escape(point)))
    return activations[0]


# ------------------------------------------------------------------------------------------------------------ rounding


class Grid(NamedTuple):
    """The values of a format: level · scale of the block.

    Args:
        levels: In ascending order.
        codes: How the format writes each of them.
        block: Consecutive elements of a row that share a scale.
    """

    levels: Float[Tensor, " levels"]
    codes: Integer[Tensor, " levels"]
    block: int

    def nearest(self, x: Float[Tensor, "*size"]) -> Int[Tensor, "*size"]:
        """The index of the level nearest to each element."""
        return torch.bucketize(x.contiguous(), (self.levels[1:] + self.levels[:-1]) / 2)


def quantize_by_moments(w: Float[Tensor, "out in"], moments: Moments, first_row: Quantized, sweeps: int) -> Quantized:
    """W in the format of `first_row`, a quantized matrix as wide as W: rotated, W R by the moments of x R."""
    if isinstance(first_row, Rotated):
        r = partial(rotate_rows, block=first_row.block)
        of_rotated = Moments(*(r(r(m).T).T for m in moments))
        return replace(first_row, base=_quantize_plain(r(w), of_rotated, gather_base(first_row), sweeps))
    return _quantize_plain(w, moments, first_row, sweeps)


def _quantize_plain(w: Float[Tensor, "out in"], moments: Moments, first_row: ScaledCodes, sweeps: int) -> ScaledCodes:
    h, w = moments.h, least_squares_weight(w, moments)
    grid = _grid(first_row, w.dtype)
    quantized = _with_scales(first_row, search_scales(w, h.diagonal(), grid))
    scale = _absmax(quantized).to(w.dtype).view(len(w), -1).repeat_interleave(grid.block, 1)
    order = h.diagonal().argsort(descending=True, stable=True)
    w, h, scale = w[:, order], h[order][:, order], scale[:, order]
    indices = round_columns(w, h, scale, grid)
    for _ in range(sweeps):
        indices = round_again(indices, w, h, scale, grid)
    return _with_codes(quantized, grid.codes[indices[:, order.argsort()]])


def least_squares_weight(w: Float[Tensor, "out in"], moments: Moments) -> Float[Tensor, "out in"]:
    """W* = argmin ‖X Wᵀ - X̂ W*ᵀ‖² + λ ‖W* - W‖² = W + W Σ(x - x̂) x̂ᵀ H⁻¹."""
    change = torch.linalg.solve(moments.h.double(), (w @ moments.drift).double(), left=False)
    return w + change.to(w.dtype)


def search_scales(
    w: Float[Tensor, "out in"], importance: Float[Tensor, " in"], grid: Grid
) -> Float[Tensor, "out blocks"]:
    """The scale of each block: of SCALE_FRACTIONS of its largest magnitude that of the least Σ_j H_jj (w_j - q_j)²."""
    blocks = w.unflatten(1, (-1, grid.block))
    weights = importance.view(-1, grid.block)
    largest = blocks.abs().amax(-1)
    best, least = largest, torch.full_like(largest, torch.inf)
    for fraction in SCALE_FRACTIONS:
        scale = (fraction * largest)[..., None]
        errors = grid.levels[grid.nearest(blocks / scale)] * scale - blocks
        total = (errors.square_() * weights).sum(-1)
        best = torch.where(total < least, fraction * largest, best)
        least = torch.minimum(total, least)
    return best


def round_columns(
    w: Float[Tensor, "out in"], h: Float[Tensor, "in in"], scale: Float[Tensor, "out in"], grid: Grid
) -> Int[Tensor, "out in"]:
    """The index of the level of each element: columns from left to right, the error of each spread over the rest."""
    u = inverse_factor(h).to(w.dtype)
    w, scale = w.T.clone(memory_format=torch.contiguous_format), scale.T.contiguous()
    indices = torch.empty(w.shape, dtype=torch.int64, device=w.device)
    errors = torch.empty_like(w)
    for start in range(0, len(w), COLUMNS):
        end = min(start + COLUMNS, len(w))
        for j in range(start, end):
            indices[j] = grid.nearest(w[j] / scale[j])
            errors[j] = (w[j] - grid.levels[indices[j]] * scale[j]) / u[j, j]
            w[j:end] -= u[j, j:end, None] * errors[j]
        w[end:] -= u[start:end, end:].T @ errors[start:end]
    return indices.T


def round_again(
    indices: Int[Tensor, "out in"],
    w: Float[Tensor, "out in"],
    h: Float[Tensor, "in in"],
    scale: Float[Tensor, "out in"],
    grid: Grid,
) -> Int[Tensor, "out in"]:
    """Coordinate descent: each column in turn as it is best while the others are as they are."""
    scale, indices = scale.T.contiguous(), indices.T.clone(memory_format=torch.contiguous_format)
    q = grid.levels[indices] * scale
    gradient = h @ (q - w.T)
    for start in range(0, len(q), COLUMNS):
        end = min(start + COLUMNS, len(q))
        before = q[start:end].clone()
        for j in range(start, end):
            indices[j] = grid.nearest((q[j] - gradient[j] / h[j, j]) / scale[j])
            step = grid.levels[indices[j]] * scale[j] - q[j]
            q[j] += step
            gradient[start:end] += h[start:end, j, None] * step
        gradient[end:] += h[end:, start:end] @ (q[start:end] - before)
    return indices.T


def inverse_factor(h: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """The upper triangular U with H⁻¹ = UᵀU, in fp64: the inverse of H's factor from the last row up."""
    h = h.double()
    factor = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(factor, torch.eye(len(h), dtype=h.dtype, device=h.device), upper=True)


# ------------------------------------------------------------------------------------------------------------- formats


def _grid(w: ScaledCodes, dtype: torch.dtype) -> Grid:
    """The values of the format of `w`."""
    if isinstance(w, RowwiseInt8):
        integers = torch.arange(-127, 128, device=w.codes.device)
        return Grid((integers / 127).to(dtype), integers.to(torch.int8), w.shape[1])
    levels, codes = w.code.to(dtype).sort(stable=True)
    return Grid(levels, codes.to(torch.uint8), BLOCK)


def _with_scales(row: ScaledCodes, absmax: Float[Tensor, "out blocks"]) -> ScaledCodes:
    """A matrix of equal rows with these scales, which are quantized too if those of the row are."""
    codes, absmax = row.codes.expand(len(absmax), -1), absmax.float().flatten()
    if not isinstance(row, Blockwise4bit) or row.offset is None:
        return replace(row, codes=codes, absmax=absmax)
    offset = absmax.mean()
    quantized_absmax = quantize_blockwise(absmax - offset, SCALES_BLOCK, torch.float32)
    return replace(row, codes=codes, absmax=quantized_absmax, offset=offset)


def _absmax(w: ScaledCodes) -> Float[Tensor, " blocks"]:
    """The scales of `w`, by which its levels are multiplied."""
    return w.absmax if isinstance(w, RowwiseInt8) else scales(w)


def _with_codes(w: ScaledCodes, codes: Integer[Tensor, "out in"]) -> ScaledCodes:
    """`w` with other codes, two of 4 bits in a byte."""
    return replace(w, codes=codes[:, 0::2] << 4 | codes[:, 1::2] if isinstance(w, Blockwise4bit) else codes)
