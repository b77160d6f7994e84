"""Matrices quantized by bitsandbytes, as `save_pretrained` of transformers writes them: read and written.

4 bits   NAME.weight           bytes in a column, two codes in each, of [out, in] by rows
         NAME.weight.absmax, .quant_map, and if the scales are quantized too, .nested_absmax, .nested_quant_map
         NAME.weight.quant_state.bitsandbytes__nf4    the other fields, as JSON in bytes
8 bits   NAME.weight           int8 [out, in], with NAME.SCB, the largest magnitude of each row

Source: bitsandbytes 0.50, functional.QuantState.as_dict; nn.modules.Linear8bitLt._save_to_state_dict.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgpt.errors import InputError, short_repr
from fgpt.families.mapping import Family, LazyTensor, TensorMapping, is_head, join_heads, to_hf
from fgpt.io.serialization import check_quantized
from fgpt.kernels.bitsandbytes_ops import register
from fgpt.kernels.quantized_linear import (
    BLOCK,
    QUANTIZED,
    Blockwise4bit,
    Blockwise8bit,
    Quantized,
    Rotated,
    RowwiseInt8,
    scales,
    slice_rows,
)
from fgpt.layers import weight_matrices
from fgpt.model import GPT
from fgpt.tree import replace_at
from fgpt.weights import dtype

NESTED_PARTS = ("nested_absmax", "nested_quant_map")
STATE = "quant_state.bitsandbytes__"
PART = re.compile(
    rf"(?P<layer>.+)\.(?P<part>weight\.(?:(?:nested_)?(?:absmax|quant_map)|{re.escape(STATE)}\w+)|SCB|weight_format)"
)
STATE_FIELDS = {"quant_type", "shape", "dtype", "blocksize", "nested_blocksize", "nested_dtype", "nested_offset"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------- reading


def collect_quantized(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` with the parts of each quantized matrix combined to one node [out, in], under the name of its weight.

    Raises InputError if a weight is missing; and when a matrix is read, if a part of it is missing or not what
    bitsandbytes writes, or if its 4-bit blocks are not of 64 elements.
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
    tensors: dict[str, Any] = {part: x.read() for part, x in parts.items()}
    read = _rowwise_int8 if "SCB" in tensors else _blockwise_4bit
    node = read(codes.read(), tensors, name)  # pyright: ignore[reportArgumentType]
    check_quantized(node, name)
    return node


def _rowwise_int8(codes: Tensor, parts: Mapping[str, Tensor], name: str) -> RowwiseInt8:
    scales, form = parts["SCB"], parts.get("weight_format")
    if codes.dtype != torch.int8 or codes.ndim != 2 or scales.dtype != torch.float32 or scales.ndim != 1:
        got = _describe(codes, scales)
        raise InputError(f"tensor {name}: expected int8 [out, in] and SCB float32 [out], got {got}")
    if form is not None and (form.numel() != 1 or form.any()):
        raise InputError(f"tensor {name}: weight_format {form.tolist()} is a layout of old GPUs; expected 0, row-major")
    return RowwiseInt8(codes, scales)


class _State(NamedTuple):
    """The JSON beside the codes of a 4-bit matrix."""

    kind: Any
    shape: tuple[int, int]
    dtype: torch.dtype
    block: Any
    nested_block: int | None
    """The block size of the scales if they are quantized too, else None or 0."""
    offset: float | None


def _parse_state(packed: Tensor) -> _State:
    """The state in a tensor of bytes. Raises one of MALFORMED if it is none."""
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise ValueError(_describe(packed))
    state: Any = json.loads(bytes(packed.tolist()))
    if surplus := state.keys() - STATE_FIELDS:
        raise ValueError(f"it has {short_repr(min(surplus))} too")
    out, inp = state["shape"]
    nested, offset = state.get("nested_blocksize"), None
    if nested:
        if state["nested_dtype"] != "float32":
            raise ValueError(f"nested_dtype {state['nested_dtype']!r}")
        offset = float(state["nested_offset"])
    if {type(out), type(inp), type(nested or 0)} != {int} or min(out, inp) < 1 or not math.isfinite(offset or 0.0):
        raise ValueError(f"shape {[out, inp]}, nested_blocksize {nested}, nested_offset {offset}")
    return _State(state["quant_type"], (out, inp), DTYPES[state["dtype"]], state["blocksize"], nested, offset)


MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


def _blockwise_4bit(codes: Tensor, parts: dict[str, Tensor], name: str) -> Blockwise4bit:
    states = [part for part in parts if part.startswith(STATE)]
    if len(states) != 1:
        raise InputError(f"tensor {name}: expected one {STATE}nf4 or fp4 beside it, got {', '.join(states) or 'none'}")
    try:
        state = _parse_state(parts[states[0]])
    except MALFORMED as err:
        why = repr(err)[:200]
        raise InputError(f"tensor {name}.{states[0]}: not the state of a 4-bit matrix ({why})") from None
    nested = state.nested_block
    required = ["absmax", "quant_map"]
    if nested:
        required += ["nested_absmax", "nested_quant_map"]
    if missing := [part for part in required if part not in parts]:
        raise InputError(f"tensor {name}.{missing[0]} is missing")

    (out, inp), absmax, code = state.shape, parts["absmax"], parts["quant_map"]
    floats = [code, *(parts[part] for part in ("nested_absmax", "nested_quant_map") if part in parts)]
    vectors = [absmax, *(parts[part] for part in ("nested_absmax",) if part in parts)]
    fits = (
        codes.numel() * codes.element_size() * 2 == out * inp
        and inp % 2 == 0
        and all(x.dtype == torch.float32 for x in floats)
        and all(x.ndim == 1 for x in vectors)
    )
    is_nested = absmax.dtype == torch.uint8 and parts.get("nested_quant_map", code).shape == (256,)
    faults = (
        (state.block != BLOCK, f": expected blocks of {BLOCK}, bitsandbytes' default, got {short_repr(state.block)}"),
        (not codes.ndim, ": expected the codes of a matrix, got a scalar"),
        (not fits, f": {_describe(codes, absmax, code)} do not make a 4-bit matrix of [{out}, {inp}]"),
        (
            not nested and absmax.dtype != torch.float32,
            f".absmax: expected float32, as its state has no nested scales, got {_describe(absmax)}",
        ),
        (nested and not is_nested, f".absmax: expected uint8 and a map of 256 values, got {_describe(absmax)}"),
    )
    for is_fault, message in faults:
        if is_fault:
            raise InputError(f"tensor {name}{message}")
    _check_code(state.kind, code, name)

    scales: Any = absmax
    if nested:
        scales = Blockwise8bit(absmax, parts["nested_absmax"], parts["nested_quant_map"], nested)
        check_quantized(scales, f"{name}.absmax")
    codes = codes.contiguous().view(torch.uint8)  # bitsandbytes may store the bytes as another dtype
    offset = None if state.offset is None else torch.tensor(state.offset, dtype=torch.float32)
    return Blockwise4bit(codes.view(out, inp // 2), scales, code, offset, state.kind, state.dtype)


def _check_code(kind: Any, code: Tensor, name: str) -> None:
    """Raises InputError if the 16 values are not those that the kernels use for `kind`."""
    from bitsandbytes.functional import get_4bit_type

    if kind not in ("nf4", "fp4"):
        raise InputError(f"tensor {name}: quant_type is {short_repr(kind)}; expected 'nf4' or 'fp4'")
    values: Any = get_4bit_type(kind, device=code.device)
    if code.shape != (16,) or not torch.allclose(code, values, atol=1e-6):
        raise InputError(f"tensor {name}.quant_map: not the values of {kind}")


def _describe(*tensors: Tensor) -> str:
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in tensors)


# ------------------------------------------------------------------------------------------------------------- writing


def to_bitsandbytes(params: GPT, family: Family) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The hub's tensors of a tree with quantized weights, and the quantization_config that transformers reads them by.

    Of a matrix that the hub has as one and we as q, k and v, quantized scales are written in fp32: each of the three
    has an offset of its own. Its values are the same.

    Raises InputError for weights that bitsandbytes' files do not hold: of two formats, blockwise8, rotated, outside the
    blocks, or only a part of q, k and v that the hub has as one; and for a tree that still carries adapters.
    """
    quantized = {path: w for path, w in weight_matrices(params).items() if isinstance(w, QUANTIZED)}
    kind = _common_format(quantized)
    unwritten = {f"{path}.w": torch.empty(w.shape, device="meta") for path, w in quantized.items()}
    tensors = to_hf(replace_at(params, unwritten), family)
    names: dict[str, TensorMapping] = {}
    for s in family.tensor_mappings(params.cfg):
        names[s.name if is_head(s.name) else family.prefix + s.name] = s
    skipped: list[str] = []
    for name, x in list(tensors.items()):
        layer = name.removesuffix(".weight")
        if x.is_meta:
            del tensors[name]
            tensors |= _parts(layer, [_of_path(quantized, path, params) for path in names[name].paths], names[name])
        elif x.ndim == 2 and layer != name:
            skipped.append(layer)
    config: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": sorted({*skipped, "lm_head"})}
    if kind == "int8":
        return tensors, config | {"load_in_8bit": True}
    is_nested = any(name.endswith(NESTED_PARTS) for name in tensors)
    of_4bit = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": is_nested, "bnb_4bit_quant_storage": "uint8"}
    compute_dtype = str(dtype(params.wte.w)).removeprefix("torch.")
    return tensors, config | {"load_in_4bit": True, "bnb_4bit_compute_dtype": compute_dtype} | of_4bit


def _common_format(quantized: Mapping[str, Quantized]) -> str:
    """nf4, fp4 or int8. Raises InputError if some weight is of none, or another one than the others."""
    formats: dict[str, str] = {}
    for path, w in quantized.items():
        if isinstance(w, Rotated | Blockwise8bit):
            raise InputError(f"{path} is {type(w).__name__}: bitsandbytes' files hold nf4, fp4 and int8")
        if not path.startswith("blocks."):
            raise InputError(f"{path} is quantized: bitsandbytes' files hold quantized layers of the blocks alone")
        formats[path] = w.kind if isinstance(w, Blockwise4bit) else "int8"
    if len({*formats.values()}) != 1:
        one_of_each = ", ".join(f"{path} is {x}" for path, x in {x: (p, x) for p, x in formats.items()}.values())
        raise InputError(f"bitsandbytes' files hold one format: {one_of_each or 'no weight is quantized'}")
    return next(iter(formats.values()))


def _of_path(quantized: Mapping[str, Quantized], leaf: str, params: GPT) -> Quantized:
    """The weight at a leaf's path; q, k and v of a fused one are its rows."""
    layer = leaf.removesuffix(".w")
    if layer in quantized:
        return quantized[layer]
    block, _, part = layer.rpartition(".")
    n, kv = (params.cfg.head_size * heads for heads in (params.cfg.n_head, params.cfg.kv_heads))
    rows = {"q": slice(0, n), "k": slice(n, n + kv), "v": slice(n + kv, n + 2 * kv)}
    if f"{block}.qkv" not in quantized:
        raise InputError(f"{layer} is not quantized, but others are that the hub has as one with it: quantize all")
    return slice_rows(quantized[f"{block}.qkv"], rows[part])


def _parts(layer: str, weights: list[Quantized], s: TensorMapping) -> dict[str, Tensor]:
    """The tensors of the matrix whose rows are those of `weights`."""
    by_rows = replace(s, transposed=False)
    codes = join_heads([w.codes for w in weights], by_rows)  # pyright: ignore[reportAttributeAccessIssue]
    name, first = f"{layer}.weight", weights[0]
    if isinstance(first, RowwiseInt8):
        absmax = [w.absmax[:, None] for w in weights if isinstance(w, RowwiseInt8)]
        form = torch.zeros((), dtype=torch.uint8)
        return {name: codes, f"{layer}.SCB": join_heads(absmax, by_rows).flatten(), f"{layer}.weight_format": form}
    assert isinstance(first, Blockwise4bit)
    state: dict[str, Any] = {
        "quant_type": first.kind,
        "blocksize": BLOCK,
        "dtype": str(first.dtype).removeprefix("torch."),
        "shape": [len(codes), 2 * codes.shape[1]],
    }
    parts: dict[str, Tensor] = {"quant_map": first.code}
    if len(weights) == 1 and isinstance(first.absmax, Blockwise8bit):
        assert first.offset is not None
        nested = first.absmax
        parts |= {"absmax": nested.codes, "nested_absmax": nested.absmax, "nested_quant_map": nested.code}
        offset = {"nested_dtype": "float32", "nested_offset": float(first.offset)}
        state |= {"nested_blocksize": nested.block} | offset
    else:
        by_block = [scales(w).view(len(w.codes), -1) for w in weights if isinstance(w, Blockwise4bit)]
        parts["absmax"] = join_heads(by_block, by_rows).flatten()
    parts[f"{STATE}{first.kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name: codes.reshape(-1, 1)} | {f"{name}.{part}": x for part, x in parts.items()}
