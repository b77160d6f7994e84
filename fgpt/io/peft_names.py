"""The hub's modules and our layers: their names, and q, k and v as rows of one module.

Where they are (GPT-2's c_attn, GPT-NeoX's query_key_value), an adapter of our `attn.qkv` is the module's. Those of q, k
or v alone, which PEFT cannot express, are stacked, and what is absent stays as it was:

    LoRA   A' = [A_q; A_v], B' has each B in its own rows and columns, and alpha' keeps the scale
    DoRA   the same, and the magnitudes one after the other: ‖W_i‖ for an absent row
    IA3    the rows one after the other: 1 for an absent row

What was stacked is kept as {part: [rank, alpha]}, or {part: []} for IA3, so that it can be unstacked.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fgpt import families
from fgpt.adapters import IA3, DoRA, LoRA
from fgpt.errors import InputError, shown
from fgpt.families.names import is_head
from fgpt.model import Config, Linear, Norm, RMSNorm, skeleton
from fgpt.tree import device, leaves, update, walk
from fgpt.weights import Weight, row_norms, shape

Held = Mapping[str, list[Any]]
S = TypeVar("S", LoRA, DoRA, IA3)

PREFIX = "base_model.model."
HEAD, OLD_HEAD = "lm_head", "embed_out"  # of a GPT-NeoX before transformers 5.14, and of its files


@dataclass(frozen=True)
class Module:
    """A linear layer or a norm of the hub's, and where it is in our tree."""

    name: str
    path: str
    parts: tuple[str, ...]
    """q, k and v where it is all three, and `path` the layer of a fused base; else `path` alone."""
    norm: bool
    transposed: bool
    heads: int
    """Above 0 its rows are q's, k's and v's by turns, head by head."""


def modules_of(cfg: Config) -> list[Module]:
    """The modules that PEFT's adapters of a model are on. Raises InputError where no family of the hub's has it."""
    try:
        family = families.of(cfg)
    except InputError:
        says = "PEFT's files name layers as a family of the hub's does, and this model is of none"
        raise InputError(f"{says}: save_adapters(adapters, path) keeps its adapters") from None
    nodes, found = dict(walk(skeleton(cfg))), []
    for s in family.stored(cfg):
        parts = tuple(path.removesuffix(".w") for path in s.paths)
        if isinstance(node := nodes[parts[0]], Linear | Norm | RMSNorm):  # no bias, which goes with its weight
            name = HEAD if is_head(s.name) else family.prefix + s.name.removesuffix(".weight")
            path = parts[0] if len(parts) == 1 else f"{parts[0][:-1]}qkv"
            found.append(Module(name, path, parts, not isinstance(node, Linear), s.transposed, s.heads))
    return found


def named(known: Iterable[Module]) -> dict[str, Module]:
    """The modules by all that a file may call them: of a model without its head, they have no prefix."""
    return {name: m for m in known for name in (m.name, m.name.partition(".")[2] or OLD_HEAD)}


def targets(chosen: Iterable[Module], known: Iterable[Module]) -> list[str]:
    """The shortest names that select just `chosen`: a layer's, where all that it selects are among them."""
    names, found = {m.name for m in chosen}, set()
    rest = [f".{m.name}" for m in known if m.name not in names]
    for name in names:
        layer = re.sub(r"^(\w+\.)?(\w+\.\d+\.)?", "", name)
        found.add(name if any(x.endswith(f".{layer}") for x in rest) else layer)
    return sorted(found)


# ------------------------------------------------------------------------------------------------------------ stacking


def stack(parts: Mapping[str, Any], weights: Mapping[str, Weight]) -> LoRA | DoRA | IA3:
    """Adapters of one kind on some of q, k and v, which have these weights, as one of all three."""
    first = next(iter(parts.values()))
    if isinstance(first, IA3):
        if any(p.row is None or p.col is not None for p in parts.values()):
            raise InputError("IA3 on the inputs of q, k or v: PEFT has no such; save_adapters(adapters, path) keeps it")
        ones = {x: torch.ones(shape(w)[0], device=device(first)) for x, w in weights.items()}
        return IA3(torch.cat([parts[x].row if x in parts else ones[x] for x in weights]))
    if isinstance(first, DoRA):
        lora: Any = stack({x: p.lora for x, p in parts.items()}, weights)
        return DoRA(lora, torch.cat([parts[x].m if x in parts else _norms(w) for x, w in weights.items()]))
    bs = {x: torch.zeros(shape(w)[0], 0, device=device(first)) for x, w in weights.items()}
    for x, p in parts.items():  # exact even for unequal scales: the quotient is absorbed in B
        bs[x] = p.b if _near(p.scale, first.scale) else p.b * (p.scale / first.scale)
    a, rs = torch.cat([parts[x].a for x in weights if x in parts]), all(p.rs for p in parts.values())
    alpha = first.scale * (len(a) ** 0.5 if rs else len(a))
    return LoRA(a, torch.block_diag(*bs.values()), alpha, rs, dropout_of(parts.values()))


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
        except (TypeError, ValueError, IndexError, KeyError, OverflowError):
            raise InputError(f"stacked {x} is {shown(parts[x])}; expected [rank, alpha]") from None
        rows, columns = slice("qkv".index(x) * d, ("qkv".index(x) + 1) * d), slice(at, at + rank)
        one = replace(lora, a=lora.a[columns], b=lora.b[rows, columns], alpha=alpha)
        if rank < 1 or one.a.shape[0] != rank or not 0 < abs(alpha) <= 1e300:
            raise InputError(f"stacked {x} has rank {rank} and alpha {alpha}, but {lora.a.shape[0] - at} rows are left")
        # parts of unequal scales were brought to one by their B
        one = one if _near(one.scale, lora.scale) else replace(one, b=one.b * (lora.scale / one.scale))
        made[x] = DoRA(one, whole.m[rows]) if isinstance(whole, DoRA) else one
        at += rank
    if at != len(lora.a):
        raise InputError(f"stacked parts have ranks {at} in all, but A has {len(lora.a)} rows")
    return made


def thirds(whole: IA3) -> dict[str, IA3]:
    """IA3 on q, k and v in one as IA3 on each: the same model."""
    rows = [None] * 3 if whole.row is None else whole.row.chunk(3)
    return {x: IA3(row, whole.col) for x, row in zip("qkv", rows, strict=True)}


def by_turns(x: S, module: Module, back: bool = False) -> S:
    """`x`, whose rows are q's, then k's, then v's, with the rows as `module` has them; or `back`. To the bit."""
    sizes = (len(module.parts), module.heads or 1)[:: -1 if back else 1]

    def turned(rows: Tensor) -> Tensor:
        each, rest = divmod(len(rows), sizes[0] * sizes[1])  # where some are left, `adapt` says that they do not fit
        return rows if rest else rows.unflatten(0, (*sizes, each)).transpose(0, 1).flatten(0, 2)

    return update(x, {name: turned(y) for name, y in leaves(x).items() if name in ("row", "b", "lora.b", "m")})


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
