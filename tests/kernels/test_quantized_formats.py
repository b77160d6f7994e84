"""Quantized matrices have bitsandbytes' numbers to the bit."""

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from builders.quantized import FORMATS, normal_matrix
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from fgpt.kernels.quantized_linear import (
    Blockwise4bit,
    Blockwise8bit,
    RowwiseInt8,
    dequantize,
    quantize_matrix,
    quantized_embedding,
    quantized_linear,
    reference,
    slice_rows,
)
from fgpt.tree import nbytes

pytestmark = pytest.mark.usefixtures("exact_derivatives")

HALF = (torch.float32, torch.bfloat16, torch.float16)


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_bitsandbytes(kind: Any, double: bool, dtype: torch.dtype):
    w = normal_matrix(48, 320, dtype=dtype)  # 240 scales: not a whole block of them
    ours = quantize_matrix(w, kind, double)
    state: Any
    codes, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=double, quant_type=kind)
    assert isinstance(ours, Blockwise4bit)
    assert torch.equal(ours.codes.flatten(), codes.flatten())
    assert torch.equal(ours.code, state.code)
    if double:
        assert isinstance(ours.absmax, Blockwise8bit)
        assert ours.offset is not None
        assert torch.equal(ours.offset, state.offset)
        assert torch.equal(ours.absmax.codes, state.absmax)
        assert torch.equal(ours.absmax.absmax, state.state2.absmax)
        assert torch.equal(ours.absmax.code, state.state2.code)
    else:
        assert isinstance(ours.absmax, Tensor)
        assert ours.offset is None
        assert torch.equal(ours.absmax, state.absmax)
    expanded = dequantize(ours)
    assert expanded.dtype == dtype
    assert torch.equal(expanded, bnb.dequantize_4bit(codes, state))
    assert (expanded - w).abs().mean() < 0.13 * w.abs().mean()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_eight_bits_by_block_are_bitsandbytes(dtype: torch.dtype):
    w = normal_matrix(48, 320, dtype=dtype)
    ours = quantize_matrix(w, "blockwise8")
    state: Any
    codes, state = bnb.quantize_blockwise(w, blocksize=64)
    assert isinstance(ours, Blockwise8bit)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.code, state.code)
    assert torch.equal(dequantize(ours), bnb.dequantize_blockwise(codes, state))
    assert (dequantize(ours) - w).abs().mean() < 0.02 * w.abs().mean()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_eight_bits_by_row_are_bitsandbytes(dtype: torch.dtype):
    w = normal_matrix(48, 100, dtype=dtype)
    ours = quantize_matrix(w, "int8")
    codes, absmax, _ = bnb.int8_vectorwise_quant(w)
    assert isinstance(ours, RowwiseInt8)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)
    assert (dequantize(ours, torch.float32) - w.float()).abs().max() <= w.float().abs().max() / 127 * 0.51


@given(st.sampled_from(FORMATS), st.booleans(), st.sampled_from(HALF), st.integers(1, 9), st.integers(1, 5), st.data())
def test_the_definition_the_operator_and_the_parts_are_one(
    kind: Any, double: bool, dtype: torch.dtype, rows: int, blocks: int, data: st.DataObject
):
    """Bitwise: `dequantize` is `reference`; `quantized_embedding` and `slice_rows` are its rows."""
    w = quantize_matrix(normal_matrix(rows, 64 * blocks, seed=data.draw(st.integers(0, 99)), dtype=dtype), kind, double)
    expanded = dequantize(w)
    assert w.shape == expanded.shape == (rows, 64 * blocks)
    assert torch.equal(reference(w), dequantize(w, torch.float32))
    assert torch.equal(reference(w).to(dtype), expanded)
    chosen = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, rows - 1), min_size=2, max_size=2), min_size=1)))
    assert torch.equal(quantized_embedding(w, chosen), expanded[chosen])
    assert torch.equal(vmap(lambda r: quantized_embedding(w, r))(chosen), expanded[chosen])
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows + 2))
    part = slice_rows(w, slice(start, stop))
    assert type(part) is type(w)
    assert torch.equal(dequantize(part), expanded[start:stop])
    assert part.shape == expanded[start:stop].shape


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_zeros_and_large_rows_survive(kind: Any):
    w = normal_matrix(4, 64)
    w[1], w[2] = 0, w[2] * 1e30
    expanded = dequantize(quantize_matrix(w, kind, False))
    assert torch.equal(expanded[1], torch.zeros(64)) or kind == "blockwise8"  # whose 0 is 2e-5 of a block's largest
    assert torch.isfinite(expanded).all()
    x = torch.stack([torch.zeros(64), torch.ones(64)])
    assert torch.isfinite(quantized_linear(x, quantize_matrix(w, kind, False))).all()
    assert torch.equal(quantized_linear(x, quantize_matrix(w, kind, False))[0], torch.zeros(4))


# ----------------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("kind", "double", "most"),
    [
        ("nf4", True, 0.516),
        ("fp4", True, 0.516),
        ("nf4", False, 0.563),
        ("blockwise8", True, 1.063),
        ("int8", True, 1.002),
    ],
)
def test_bytes_a_number(kind: Any, double: bool, most: float):
    """Of 2048 x 2048; the code of 256 values is one for the whole tree."""
    one = quantize_matrix(normal_matrix(2048, 2048), kind, double)
    shared = 1024 if isinstance(one, Blockwise8bit) or isinstance(getattr(one, "absmax", None), Blockwise8bit) else 0
    assert most - 0.001 < (nbytes(one) - shared) / 2048**2 <= most
    tree = [one, quantize_matrix(normal_matrix(2048, 2048, seed=1), kind, double)]
    assert nbytes(tree) == 2 * (nbytes(one) - shared) + shared
