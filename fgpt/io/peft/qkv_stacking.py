"""Our LoRA, DoRA and IA3 on modules of PEFT's: q, k and v as rows of one, and one scale and rank for all.

Where q, k and v are one module (GPT-2's c_attn, GPT-NeoX's query_key_value), an adapter of our `attn.qkv` is the
module's. Those of q, k or v alone, which PEFT cannot express, are stacked, and what is absent stays as it was:

    LoRA   A' = [A_q; A_v], B' has each B in its own rows and columns
    DoRA   the same, and the magnitudes one after the other: ‖W_i‖ for an absent row
    IA3    the rows one after the other: 1 for an absent row

Some readers of PEFT's files take lora_alpha / r for the scale of every module, and others lora_alpha / len(A). So that
all read the same product, every module is written with one rank, the largest, and one scale, the commonest: A and B are
padded with zeros, and B takes up the quotient of the scales.

What was stacked, padded or rescaled is kept as {part: [rank, alpha, rs]}, of a whole module {"": ..}, or {part: []} for
IA3, so that loading can restore it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from fgpt.adapter_dora import DoRA
from fgpt.adapter_ia3 import IA3
from fgpt.adapter_lora import LoRA
from fgpt.errors import InputError, short_repr
from fgpt.io.peft.modules import Module
from fgpt.tree import device, leaves, replace_at
from fgpt.weights import Weight, row_norms, shape

StackedParts = Mapping[str, list[Any]]
S = TypeVar("S", LoRA, DoRA, IA3)


def stack_qkv(parts: Mapping[str, Any], weights: Mapping[str, Weight], scale: float) -> LoRA | DoRA | IA3:
    """Adapters of one kind on some of q, k and v, which have these weights, as one of all three, a LoRA of `scale`."""
    first = next(iter(parts.values()))
    if isinstance(first, IA3):
        if any(p.row is None or p.col is not None for p in parts.values()):
            raise InputError("IA3 on the inputs of q, k or v: PEFT has no such; save_adapters(adapters, path) keeps it")
        ones = {x: torch.ones(shape(w)[0], device=device(first)) for x, w in weights.items()}
        return IA3(torch.cat([parts[x].row if x in parts else ones[x] for x in weights]))
    if isinstance(first, DoRA):
        lora: Any = stack_qkv({x: p.lora for x, p in parts.items()}, weights, scale)
        return DoRA(lora, torch.cat([parts[x].m if x in parts else _norms(w) for x, w in weights.items()]))
    bs = {x: torch.zeros(shape(w)[0], 0, device=device(first)) for x, w in weights.items()}
    bs |= {x: _rescale(p, scale).b for x, p in parts.items()}
    a = torch.cat([parts[x].a for x in weights if x in parts])
    return LoRA(a, torch.block_diag(*bs.values()), scale * len(a), dropout=dropout_of(parts.values()))


def commonest_scale(loras: Iterable[LoRA]) -> float:
    """The scale that most of `loras` have, of those that change anything."""
    scales = [x.scale for x in loras]
    return max(set(scales), key=lambda scale: (scale != 0, scales.count(scale)))


def pad_rank(x: LoRA, rank: int, scale: float) -> LoRA:
    """The same product with `rank` and `scale`: A and B end in zeros, and stay so in training."""
    more = rank - len(x.a)
    a, b = F.pad(x.a, (0, 0, 0, more)), F.pad(_rescale(x, scale).b, (0, more))
    return LoRA(a, b, scale * rank, dropout=x.dropout)


def _rescale(x: LoRA, scale: float) -> LoRA:
    """The same product with another scale, up to rounding if they differ."""
    alpha = scale * len(x.a)
    return replace(x, b=x.b if _near(x.scale, scale) else x.b * (x.scale / scale), alpha=alpha, rs=False)


def stacked_parts(parts: Mapping[str, LoRA | DoRA | IA3]) -> StackedParts:
    """What `unstack` must know of `parts`."""
    loras = {x: p.lora if isinstance(p, DoRA) else p for x, p in parts.items()}
    return {x: [p.a.shape[0], p.alpha, p.rs] if isinstance(p, LoRA) else [] for x, p in loras.items()}


def unstack_qkv(whole: S, parts: StackedParts) -> dict[str, S]:
    """The adapters that were stacked, padded or rescaled.

    Raises InputError if `parts` is not what was kept of them.
    """
    if isinstance(whole, IA3):
        return {x: p for x, p in split_qkv(whole).items() if x in parts}
    lora = whole.lora if isinstance(whole, DoRA) else whole
    d, at = len(lora.b) // 3, 0
    adapters: dict[str, Any] = {}
    for x in (x for x in ("", *"qkv") if x in parts):
        rank, alpha, rs = _parse_part(x, parts[x], lora.rs)
        begin = "qkv".index(x) * d  # the index of "" is 0
        rows, columns = slice(begin, begin + d if x else None), slice(at, at + rank)
        one = replace(lora, a=lora.a[columns], b=lora.b[rows, columns], alpha=alpha, rs=rs)
        if one.a.shape[0] != rank:
            raise InputError(f"stacked {x} has rank {rank} and alpha {alpha}, but {lora.a.shape[0] - at} rows are left")
        if alpha and not _near(one.scale, lora.scale):  # its B took up the quotient
            one = replace(one, b=one.b * (lora.scale / one.scale))
        adapters[x] = DoRA(one, whole.m[rows]) if isinstance(whole, DoRA) else one
        at += rank
    trim_rank(whole, at)
    return adapters


def trim_rank(whole: S, rank: int) -> S:
    """A LoRA without the zeros that it was padded with. Raises InputError if there is something else."""
    lora: Any = whole.lora if isinstance(whole, DoRA) else whole
    if rank == len(lora.a):
        return whole
    if rank > len(lora.a) or lora.a[rank:].count_nonzero() or lora.b[:, rank:].count_nonzero():
        raise InputError(f"stacked parts have ranks {rank} in all, but A has {len(lora.a)} rows that are not zero")
    one = LoRA(lora.a[:rank], lora.b[:, :rank], lora.scale * rank, dropout=lora.dropout)
    trimmed: Any = replace(whole, lora=one) if isinstance(whole, DoRA) else one
    return trimmed


def total_rank(parts: StackedParts) -> int:
    """The rank of all that was stacked. Raises InputError as `unstack` does."""
    return sum(_parse_part(x, fields, False)[0] for x, fields in parts.items())


def _parse_part(part: str, fields: Any, rs: bool) -> tuple[int, float, bool]:
    try:
        rank, alpha, rs = int(fields[0]), float(fields[1]), fields[2] if len(fields) > 2 else rs
        if rank >= 1 and abs(alpha) <= 1e300 and isinstance(rs, bool):
            return rank, alpha, rs
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        pass
    raise InputError(f"stacked {part} is {short_repr(fields)}; expected [rank, alpha, rs]")


def split_qkv(whole: IA3) -> dict[str, IA3]:
    """IA3 on q, k and v in one as IA3 on each: the same model."""
    rows = [None] * 3 if whole.row is None else whole.row.chunk(3)
    return {x: IA3(row, whole.col) for x, row in zip("qkv", rows, strict=True)}


def interleave_heads(x: S, module: Module, back: bool = False) -> S:
    """`x`, whose rows are q's, then k's, then v's, with the rows as `module` has them; or `back`. To the bit."""
    sizes = (len(module.parts), module.heads or 1)[:: -1 if back else 1]

    def reorder(rows: Tensor) -> Tensor:
        if len(rows) % (sizes[0] * sizes[1]):  # `adapt` says that they do not fit
            return rows
        return rearrange(rows, "(a b each) ... -> (b a each) ...", a=sizes[0], b=sizes[1])

    return replace_at(x, {name: reorder(y) for name, y in leaves(x).items() if name in ("row", "b", "lora.b", "m")})


def dropout_of(loras: Iterable[LoRA]) -> float:
    """The dropout that all of `loras` have. Raises InputError if they have several."""
    rates = {x.dropout for x in loras}
    if len(rates) > 1:
        raise InputError("LoRAs of unequal dropout: PEFT has one for all; save_adapters(adapters, path) keeps them")
    return rates.pop()


def _near(x: float, y: float) -> bool:
    """Equal but for the rounding of alpha."""
    return abs(x - y) <= 1e-14 * abs(y)


def _norms(w: Weight) -> Tensor:
    (out, inp), at = shape(w), device({"": w})
    return row_norms(w, torch.zeros(1, inp, device=at), torch.zeros(out, 1, device=at), 0.0)
