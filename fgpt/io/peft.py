"""LoRA adapters in PEFT's file format, both ways: `adapter_config.json` and `adapter_model.safetensors`.

PEFT names the hub's layers, where q, k and v are one matrix, c_attn. A LoRA on our `attn.qkv` is theirs on c_attn.
LoRAs on q, k or v alone, which PEFT cannot express, are stacked exactly: A' = [A_q; A_v], B' has each B in its own rows
and columns, and alpha' = s·r', so that the scale stays. How they were stacked is kept in the file's metadata.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fgpt.adapters import Adapters, LoRA, adapt
from fgpt.errors import InputError
from fgpt.io.files import read_json, read_tensors, write_json, write_tensors
from fgpt.model import GPT, Attention

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STACKED = "fgpt_stacked"

MODULES = {"attn.qkv": "attn.c_attn", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
"""Our layers of a block, and the hub's."""

PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.(?:default\.)?weight")


# ------------------------------------------------------------------------------------------------------------- saving


def save_peft(adapters: Adapters, params: GPT, folder: Path, base: str) -> None:
    """Write LoRA `adapters` of the model `params`, known to others as `base`, so that `peft` loads them.

    Raises InputError for adapters that PEFT's LoRA format cannot hold.
    """
    adapt(params, adapters)  # a path or shape that does not fit is better met now than at loading
    loras, stacked = _stack(adapters, params)
    tensors = {
        f"{PREFIX}{module}.lora_{side}.weight": x
        for module, lora in loras.items()
        for side, x in (("A", lora.a), ("B", lora.b))
    }
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"} | ({STACKED: json.dumps(stacked)} if stacked else {}))
    write_json(folder / CONFIG, _config(loras, params.cfg.n_layer, base))


def _stack(adapters: Adapters, params: GPT) -> tuple[dict[str, LoRA], dict[str, dict[str, int]]]:
    """The LoRAs by PEFT's module names, and for stacked ones the rank that each of q, k, v holds."""
    d = params.cfg.d_model
    loras: dict[str, LoRA] = {}
    parts: dict[str, dict[str, LoRA]] = {}
    for path, lora in adapters.items():
        if not isinstance(lora, LoRA):
            raise InputError(
                f"{path} is a whole tensor: PEFT's LoRA format holds LoRAs only; save the merged model instead"
            )
        block, layer = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", path).groups()  # pyright: ignore[reportOptionalMemberAccess]
        if block and layer in MODULES:
            loras[f"transformer.h.{block}.{MODULES[layer]}"] = lora
        elif block and layer in ("attn.q", "attn.k", "attn.v"):
            parts.setdefault(f"transformer.h.{block}.attn.c_attn", {})[layer[-1]] = lora
        elif path == "head":
            loras["lm_head"] = lora
        else:
            raise InputError(f"PEFT's LoRA format has no place for an adapter on {path}; save the merged model instead")
    for module, some in parts.items():
        scale = next(iter(some.values())).scale
        zero = {x: torch.zeros(d, 0) for x in "qkv"}
        # exact even for unequal scales: the quotient is absorbed in B
        b = torch.block_diag(*(some[x].b * (some[x].scale / scale) if x in some else zero[x] for x in "qkv"))
        a = torch.cat([some[x].a for x in "qkv" if x in some])
        loras[module] = LoRA(a, b, scale * a.shape[0])
    return loras, {module: {x: some[x].a.shape[0] for x in "qkv" if x in some} for module, some in parts.items()}


def _config(loras: Mapping[str, LoRA], n_layer: int, base: str) -> dict[str, Any]:
    ranks = {module: lora.a.shape[0] for module, lora in loras.items()}
    alphas = {module: lora.alpha for module, lora in loras.items()}
    rank, alpha = (max(set(x.values()), key=list(x.values()).count) for x in (ranks, alphas))
    targets: set[str] = set()
    for module in loras:
        layer = re.sub(r"^transformer\.h\.\d+\.", "", module)
        everywhere = sum(m.endswith(f".{layer}") for m in loras) == n_layer
        targets.add(layer if everywhere else module)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,
        "inference_mode": True,
        "target_modules": sorted(targets),
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(m): a for m, a in alphas.items() if a != alpha},
    }


# ------------------------------------------------------------------------------------------------------------ loading


def load_peft(folder: Path, params: GPT) -> Adapters:
    """The LoRA adapters in `folder`, for the model `params`. A LoRA on the hub's c_attn wants a fused base:
    `load_peft(folder, fuse(params))`; one that we stacked is unstacked on a base that is not fused.

    Raises InputError for a file that is not a PEFT LoRA, or does not fit the model.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else config
        raise InputError(f"{folder / CONFIG}: expected peft_type 'LORA', got {got!r}")
    if config.get("use_dora"):
        raise InputError(f"{folder / CONFIG}: use_dora is set; expected a plain LoRA")
    tensors = read_tensors(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stacked = json.loads((file.metadata() or {}).get(STACKED, "{}"))
    ours = {theirs: layer for layer, theirs in MODULES.items()}
    adapters: Adapters = {}
    for module, (a, b) in _pairs(tensors, folder).items():
        lora = LoRA(a.float(), b.float(), _scale(config, module, a.shape[0]) * a.shape[0])
        match = re.fullmatch(r"(?:transformer\.)?h\.(\d+)\.(.+)", module)
        layer = ours.get(match[2]) if match else "head" if module == "lm_head" else None
        if layer is None:
            raise InputError(f"{folder / WEIGHTS}: adapter on {module}, which is no layer of a GPT-2")
        path = f"blocks.{match[1]}.{layer}" if match else layer
        unfused = (
            match and int(match[1]) < len(params.blocks) and isinstance(params.blocks[int(match[1])].attn, Attention)
        )
        if module in stacked and unfused:
            adapters |= _unstack(lora, stacked[module], path.removesuffix("qkv"), params.cfg.d_model)
        else:
            adapters[path] = lora
    try:
        adapt(params, adapters)
    except InputError as err:
        raise InputError(f"{folder}: {err}") from None
    return adapters


def _pairs(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    sides: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        match = KEY.fullmatch(name)
        if match is None:
            raise InputError(f"{folder / WEIGHTS}: tensor {name} is no LoRA of a linear layer")
        sides.setdefault(match["module"], {})[match["side"]] = x
    for module, pair in sides.items():
        if (
            pair.keys() != {"A", "B"}
            or pair["A"].ndim != 2
            or pair["B"].ndim != 2
            or len(pair["A"]) != pair["B"].shape[1]
        ):
            got = {side: list(x.shape) for side, x in pair.items()}
            raise InputError(f"{folder / WEIGHTS}: {module} needs A [rank, in] and B [out, rank], got {got}")
    if not sides:
        raise InputError(f"{folder / WEIGHTS}: holds no adapter")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA. Source: Kalajdzievski 2023, section 3."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for p, a in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", module)), config.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise InputError(f"{CONFIG}: expected a number for lora_alpha, got {alpha!r}")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _unstack(lora: LoRA, ranks: Mapping[str, int], parent: str, d: int) -> Adapters:
    adapters, at = {}, 0
    for x, rank in ranks.items():
        rows = slice("qkv".index(x) * d, ("qkv".index(x) + 1) * d)
        columns = slice(at, at + rank)
        adapters[f"{parent}{x}"] = LoRA(lora.a[columns], lora.b[rows, columns], lora.scale * rank)
        at += rank
    return adapters
