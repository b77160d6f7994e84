"""The hub's modules and our layers: their names, and q, k and v as rows of one module, c_attn.

An adapter of our `attn.qkv` is one of c_attn. Adapters of q, k or v alone, which PEFT cannot express, are stacked, and
what is absent stays as it was:

    LoRA   A' = [A_q; A_v], B' has each B in its own rows and columns, and alpha' keeps the scale
    DoRA   the same, and the magnitudes one after the other: ‖W_i‖ for an absent row
    IA3    the rows one after the other: 1 for an absent row

What was stacked is kept as {part: [rank, alpha]}, or {part: []} for IA3, so that it can be unstacked.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fgpt.adapters import IA3, DoRA, LoRA
from fgpt.errors import InputError
from fgpt.model import Attention
from fgpt.tree import device
from fgpt.weights import Weight, row_norms, shape

Held = Mapping[str, list[Any]]
S = TypeVar("S", LoRA, DoRA, IA3)

PREFIX = "base_model.model."
LAYERS = {"attn.qkv": "attn.c_attn", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
"""Our layers of a block, and the hub's."""
NORMS = ("ln_1", "ln_2", "ln_f")


def module_of(path: str) -> tuple[str, str]:
    """The hub's module of a path of ours, and the part of it: q, k or v of c_attn, w or b of a norm, else all, "".

    Raises InputError for a path that is no layer or norm of a GPT-2.
    """
    match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", path)
    block, layer = match.groups() if match else (None, path)
    h = "transformer." if block is None else f"transformer.h.{block}."
    if block and layer in LAYERS:
        return h + LAYERS[layer], ""
    if block and layer in ("attn.q", "attn.k", "attn.v"):
        return h + "attn.c_attn", layer[-1]
    if path == "head":
        return "lm_head", ""
    name, _, leaf = layer.partition(".")
    if name in NORMS and (block is None) == (name == "ln_f") and leaf in ("w", "b"):
        return h + name, leaf
    raise InputError(f"PEFT has no place for an adapter on {path}: save_adapters(adapters, path) keeps it")


def path_of(module: str) -> str:
    """Our path of a module of the hub's. Raises InputError where it is none of a GPT-2's."""
    ours = {theirs: layer for layer, theirs in LAYERS.items()} | {name: name for name in NORMS[:2]}
    match = re.fullmatch(r"(?:transformer\.)?h\.(\d+)\.(.+)", module)
    if match and match[2] in ours:
        return f"blocks.{match[1]}.{ours[match[2]]}"
    others = {"lm_head": "head", "transformer.ln_f": "ln_f", "ln_f": "ln_f"}
    if module not in others:
        raise InputError(f"adapter on {module}, which is no layer of a GPT-2")
    return others[module]


def targets(modules: Iterable[str], n_layer: int) -> list[str]:
    """The shortest names that select just `modules`: a layer's, where every block is among them."""
    modules = list(modules)
    found: set[str] = set()
    for module in modules:
        layer = re.sub(r"^transformer\.(h\.\d+\.)?", "", module)
        everywhere = sum(m.endswith(f".{layer}") for m in modules) == (1 if layer == "ln_f" else n_layer)
        found.add(layer if everywhere else module)
    return sorted(found)


# ------------------------------------------------------------------------------------------------------------ stacking


def stack(parts: Mapping[str, LoRA | DoRA | IA3], base: Attention) -> LoRA | DoRA | IA3:
    """Adapters of one kind on some of q, k and v of `base`, as one of c_attn."""
    weights: dict[str, Weight] = {"q": base.q.w, "k": base.k.w, "v": base.v.w}
    loras = {x: p.lora if isinstance(p, DoRA) else p for x, p in parts.items() if not isinstance(p, IA3)}
    if not loras:
        rows = {x: p.row for x, p in parts.items() if isinstance(p, IA3) and p.col is None}
        if len(rows) < len(parts):
            raise InputError("IA3 on the inputs of q, k or v: PEFT has no such; save_adapters(adapters, path) keeps it")
        like = next(x for x in rows.values() if x is not None)
        return IA3(torch.cat([rows[x] if x in rows else torch.ones_like(like) for x in weights]))  # pyright: ignore
    lora = _stack_loras(loras, {x: shape(w)[0] for x, w in weights.items()})
    magnitudes = {x: p.m for x, p in parts.items() if isinstance(p, DoRA)}
    if not magnitudes:
        return lora
    return DoRA(lora, torch.cat([magnitudes[x] if x in magnitudes else _norms(w) for x, w in weights.items()]))


def held(parts: Mapping[str, LoRA | DoRA | IA3]) -> Held:
    """What `unstack` must know of `parts`."""
    loras = {x: p.lora if isinstance(p, DoRA) else p for x, p in parts.items()}
    return {x: [p.a.shape[0], p.alpha] if isinstance(p, LoRA) else [] for x, p in loras.items()}


def unstack(whole: S, parts: Held) -> dict[str, S]:
    """The adapters that were stacked. Raises InputError where `parts` is not what was kept of them."""
    if isinstance(whole, IA3):
        return {x: p for x, p in thirds(whole).items() if x in parts}
    lora = whole.lora if isinstance(whole, DoRA) else whole
    d, at = len(lora.b) // 3, 0
    made: dict[str, Any] = {}
    for x in (x for x in "qkv" if x in parts):
        try:
            rank, alpha = int(parts[x][0]), float(parts[x][1])
        except (TypeError, ValueError, IndexError):
            raise InputError(f"stacked {x} is {parts[x]!r}; expected [rank, alpha]") from None
        rows, columns = slice("qkv".index(x) * d, ("qkv".index(x) + 1) * d), slice(at, at + rank)
        one = replace(lora, a=lora.a[columns], b=lora.b[rows, columns], alpha=alpha)
        if one.a.shape[0] != rank or not one.scale:
            raise InputError(f"stacked {x} has rank {rank} and alpha {alpha}, but {lora.a.shape[0] - at} rows are left")
        # parts of unequal scales were brought to one by their B
        one = one if _near(one.scale, lora.scale) else replace(one, b=one.b * (lora.scale / one.scale))
        made[x] = DoRA(one, whole.m[rows]) if isinstance(whole, DoRA) else one
        at += rank
    if at != len(lora.a):
        raise InputError(f"stacked parts have ranks {at} in all, but A has {len(lora.a)} rows")
    return made


def thirds(whole: IA3) -> dict[str, IA3]:
    """IA3 on c_attn as IA3 on q, on k and on v: the same model."""
    rows = [None] * 3 if whole.row is None else whole.row.chunk(3)
    return {x: IA3(row, whole.col) for x, row in zip("qkv", rows, strict=True)}


def _stack_loras(parts: Mapping[str, LoRA], outs: Mapping[str, int]) -> LoRA:
    first = next(iter(parts.values()))
    scale, device = first.scale, first.a.device
    a = torch.cat([parts[x].a for x in outs if x in parts])

    def b(x: str, out: int) -> Tensor:
        if x not in parts:
            return torch.zeros(out, 0, device=device)
        ratio = parts[x].scale / scale  # exact even for unequal scales: the quotient is absorbed in B
        return parts[x].b if _near(ratio, 1.0) else parts[x].b * ratio

    rank, rs = a.shape[0], all(p.rs for p in parts.values())
    b_whole = torch.block_diag(*(b(x, out) for x, out in outs.items()))
    return LoRA(a, b_whole, scale * (rank**0.5 if rs else rank), rs, dropout_of(parts.values()))


def dropout_of(loras: Iterable[LoRA]) -> float:
    """The dropout that all of `loras` have. Raises InputError where they have several."""
    found = {x.dropout for x in loras}
    if len(found) > 1:
        raise InputError("LoRAs of unequal dropout: PEFT has one for all; save_adapters(adapters, path) keeps them")
    return found.pop()


def _near(x: float, y: float) -> bool:
    """Equal but for the rounding of alpha."""
    return abs(x - y) <= 1e-14 * abs(y)


def _norms(w: Weight) -> Tensor:
    (out, inp), at = shape(w), device({"": w})
    return row_norms(w, torch.zeros(1, inp, device=at), torch.zeros(out, 1, device=at), 0.0)
