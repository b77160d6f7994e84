"""Matrices that bitsandbytes has quantized, as `save_pretrained` of transformers writes them.

4 bits   NAME.weight           bytes in a column, two codes in each, of [out, in] by rows
         NAME.weight.absmax, .quant_map, and where the scales are quantized too, .nested_absmax, .nested_quant_map
         NAME.weight.quant_state.bitsandbytes__nf4    the rest, as JSON in bytes
8 bits   NAME.weight           whole numbers [out, in], with NAME.SCB, the largest magnitude of each row

Source: bitsandbytes 0.50, functional.QuantState.as_dict; nn.modules.Linear8bitLt._save_to_state_dict.
"""

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fgpt.errors import InputError, shown
from fgpt.families.mapping import LazyTensor
from fgpt.io.serialization import check_quantized
from fgpt.kernels.bitsandbytes_ops import register
from fgpt.kernels.quantized_linear import BLOCK, Blockwise4bit, Blockwise8bit, Quantized, RowwiseInt8

STATE = "quant_state.bitsandbytes__"
PART = re.compile(
    rf"(?P<layer>.+)\.(?P<part>weight\.(?:(?:nested_)?(?:absmax|quant_map)|{re.escape(STATE)}\w+)|SCB|weight_format)"
)
STATE_FIELDS = {"quant_type", "shape", "dtype", "blocksize", "nested_blocksize", "nested_dtype", "nested_offset"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def collect_quantized(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` with the parts of each quantized matrix made one node [out, in], under the name of its weight.

    Raises InputError where a part is missing; and when one is read that is not what bitsandbytes writes, and for 4-bit
    blocks of other than 64.
    """
    whole = {name: x for name, x in tensors.items() if not PART.fullmatch(name)}
    parts: dict[str, dict[str, LazyTensor]] = {}
    for name in tensors.keys() - whole.keys():
        if match := PART.fullmatch(name):
            parts.setdefault(match["layer"], {})[match["part"].removeprefix("weight.")] = tensors[name]
    for layer, layer_parts in parts.items():
        if (name := f"{layer}.weight") not in whole:
            raise InputError(f"tensor {name} is missing, but {', '.join(sorted(layer_parts))} of it are there")
        whole[name] = LazyTensor(None, partial(_read, whole[name], layer_parts, name))
    if parts:
        register()
    return whole


def _read(codes: LazyTensor, parts: Mapping[str, LazyTensor], name: str) -> Quantized:
    found: dict[str, Any] = {part: x.read() for part, x in parts.items()}
    node = (_rowwise_int8 if "SCB" in found else _blockwise_4bit)(codes.read(), found, name)  # pyright: ignore[reportArgumentType]
    check_quantized(node, name)
    return node


def _rowwise_int8(codes: Tensor, parts: Mapping[str, Tensor], name: str) -> RowwiseInt8:
    scales, form = parts["SCB"], parts.get("weight_format")
    if codes.dtype != torch.int8 or codes.ndim != 2 or scales.dtype != torch.float32 or scales.ndim != 1:
        raise InputError(
            f"tensor {name}: expected int8 [out, in] and SCB float32 [out], got {_describe(codes, scales)}"
        )
    if form is not None and (form.numel() != 1 or form.any()):
        raise InputError(f"tensor {name}: weight_format {form.tolist()} is a layout of old GPUs; expected 0, by rows")
    return RowwiseInt8(codes, scales)


def _blockwise_4bit(codes: Tensor, parts: dict[str, Tensor], name: str) -> Blockwise4bit:
    states = [part for part in parts if part.startswith(STATE)]
    if len(states) != 1:
        raise InputError(f"tensor {name}: expected one {STATE}nf4 or fp4 beside it, got {', '.join(states) or 'none'}")
    packed = parts[states[0]]
    try:
        if packed.dtype != torch.uint8 or packed.ndim != 1:
            raise ValueError(_describe(packed))
        state: Any = json.loads(bytes(packed.tolist()))
        if surplus := state.keys() - STATE_FIELDS:
            raise ValueError(f"it has {shown(min(surplus))} too")
        kind, (out, inp), dtype = state["quant_type"], state["shape"], DTYPES[state["dtype"]]
        block, nested = state["blocksize"], state.get("nested_blocksize")
        offset = float(state["nested_offset"]) if nested and state["nested_dtype"] == "float32" else None
        if nested and offset is None:
            raise ValueError(f"nested_dtype {state['nested_dtype']!r}")
        if {type(out), type(inp), type(nested or 0)} != {int} or min(out, inp) < 1 or not math.isfinite(offset or 0.0):
            raise ValueError(f"shape {[out, inp]}, nested_blocksize {nested}, nested_offset {offset}")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as err:
        why = repr(err)[:200]
        raise InputError(f"tensor {name}.{states[0]}: not the state of a 4-bit matrix ({why})") from None
    wanted = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    if missing := [part for part in wanted if part not in parts]:
        raise InputError(f"tensor {name}.{missing[0]} is missing")
    if block != BLOCK:
        raise InputError(
            f"tensor {name}: quantized by blocks of {shown(block)}; expected {BLOCK}, bitsandbytes' default"
        )
    if not codes.ndim:
        raise InputError(f"tensor {name}: expected a matrix' codes, got one number")
    codes = codes.contiguous().view(torch.uint8)  # bitsandbytes may store the bytes as another dtype
    absmax, code = parts["absmax"], parts["quant_map"]
    kinds = {x.dtype for x in (code, parts.get("nested_absmax", code), parts.get("nested_quant_map", code))}
    vectors = {x.ndim for x in (absmax, parts.get("nested_absmax", absmax))}
    if codes.numel() * 2 != out * inp or inp % 2 or kinds != {torch.float32} or vectors != {1}:
        raise InputError(
            f"tensor {name}: {_describe(codes, absmax, code)} do not make a 4-bit matrix of [{out}, {inp}]"
        )
    _check_code(kind, code, name)
    if not nested and absmax.dtype != torch.float32:
        raise InputError(
            f"tensor {name}.absmax: expected float32, as its state tells of no nested ones, got {_describe(absmax)}"
        )
    if nested:
        if absmax.dtype != torch.uint8 or parts["nested_quant_map"].shape != (256,):
            raise InputError(f"tensor {name}.absmax: expected uint8 under a map of 256, got {_describe(absmax)}")
        absmax = Blockwise8bit(absmax, parts["nested_absmax"], parts["nested_quant_map"], nested)
        check_quantized(absmax, f"{name}.absmax")
    shift = None if offset is None else torch.tensor(offset, dtype=torch.float32)
    return Blockwise4bit(codes.view(out, inp // 2), absmax, code, shift, kind, dtype)


def _check_code(kind: Any, code: Tensor, name: str) -> None:
    """The kernels know a kind's 16 values by its name: a file with others would be misread."""
    from bitsandbytes.functional import get_4bit_type

    if kind not in ("nf4", "fp4"):
        raise InputError(f"tensor {name}: quant_type is {shown(kind)}; expected 'nf4' or 'fp4'")
    values: Any = get_4bit_type(kind, device=code.device)
    if code.shape != (16,) or not torch.allclose(code, values, atol=1e-6):
        raise InputError(f"tensor {name}.quant_map: not the values of {kind}")


def _describe(*tensors: Tensor) -> str:
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in tensors)
