"""Tuned leaves in PEFT's files, beside adapters: whole modules and biases.

in the file                   what it is
X.weight, X.bias              of a module that `modules_to_save` names, trained as a whole; or a bias, by `bias`
X.base_layer.weight, .bias    of a module that has an adapter: what lies below that

PEFT writes frozen weights as well, the embedding and the head if either is adapted. They are skipped if they equal
the base's, and read if they do not.

Where head and embedding are one table, a module of PEFT's `modules_to_save` is a copy, and an adapter is on one side
alone; our adapters of that table move both. So what is on both sides alike is ours on the table, and of what is on the
embedding alone the head keeps the base's table, as a leaf of the adapters.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgpt.adapter_lora import LoRA
from fgpt.adapter_types import Adapters
from fgpt.classification_head import num_classes
from fgpt.errors import InputError, printable, short_repr
from fgpt.families.mapping import join_heads, split, unfuse_qkv
from fgpt.io.peft.modules import LEAVES, SCORE, Module
from fgpt.io.peft.qkv_stacking import StackedParts
from fgpt.model import GPT, abstract_params
from fgpt.tree import leaves
from fgpt.weights import dense

KEY = re.compile(
    r"(?P<module>.+?)(\.token_adapter)?(\.(?P<where>base_layer|modules_to_save|original_module)(\.default)?)?\.(?P<ending>weight|bias)"
)


class TunedTensors(NamedTuple):
    """What PEFT's two files hold of tuned leaves, and of which modules we tuned only a part."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    parts: dict[str, StackedParts]


# ------------------------------------------------------------------------------------------------------------- writing


def both_sides(adapters: Adapters, params: GPT) -> Adapters:
    """`adapters` with the head's too, if they change a table that is embedding and head."""
    if params.head is not None or adapters.keys() & {"head", "head.w"}:
        return adapters
    return adapters | {f"head{path[3:]}": x for path, x in adapters.items() if path in ("wte", "wte.w")}


def pack_tuned(
    tuned: Mapping[str, Tensor], known: Iterable[Module], params: GPT, adapted: Collection[Module], biased: bool
) -> TunedTensors:
    """The leaves `tuned`, beside adapters on the modules `adapted`; `biased` if their format has an option `bias`.

    A classifier's head is always among them: no base has it. A norm is written as a whole, and any
    bias with its weight, with the base's values if a leaf is not tuned.

    Raises InputError for a part of a matrix, or some of the biases.
    """
    base, tuned_leaves, known = unfuse_qkv(leaves(params), params.cfg), unfuse_qkv(tuned, params.cfg), list(known)
    if num_classes(params) and not any(m.name == SCORE for m in adapted):
        tuned_leaves = {"head.w": base["head.w"]} | tuned_leaves
    bias, covered = _bias_option(tuned_leaves, known, base, adapted) if biased else ("none", set())
    tensors: dict[str, Tensor] = {}
    parts: dict[str, StackedParts] = {}
    saved: list[str] = []
    for m in known:
        paths = {ending: m.tensor_mapping(ending).paths for ending in LEAVES}
        chosen = [ending for ending in LEAVES if not tuned_leaves.keys().isdisjoint(paths[ending])]
        has = [ending for ending in LEAVES if ending in chosen or not base.keys().isdisjoint(paths[ending])]
        by_option = ["bias"] if "bias" in chosen and covered.issuperset(paths["bias"]) else []
        below = ".base_layer" if m in adapted else ""
        if below and "bias" in chosen and not by_option:
            raise InputError(
                _no_place_message(f"{m.path}.b", "a bias below an adapter, without those of all the others")
            )
        if not below and chosen != by_option:
            saved.append(m.name)
            for ending in has:
                if ending not in chosen and (m.norm or ending == "bias"):
                    tuned_leaves |= {path: base[path].float() for path in paths[ending]}
            if chosen != has:
                parts[m.name] = {LEAVES[ending]: [] for ending in chosen}
        for ending in has if m.name in saved else chosen:
            if missing := [path for path in paths[ending] if path not in tuned_leaves]:
                part = next(path for path in paths[chosen[0]] if path in tuned_leaves)
                raise InputError(_no_place_message(part, f"a part of {m.name}, without {missing[0]}"))
            whole = join_heads([tuned_leaves[path] for path in paths[ending]], m.tensor_mapping(ending))
            tensors[f"{m.name}{below}.{ending}"] = whole
    config: dict[str, Any] = {}
    if biased:
        config["bias"] = bias
    if saved:
        config["modules_to_save"] = saved
    return TunedTensors(tensors, config, parts)


def _no_place_message(path: str, what: str) -> str:
    return f"PEFT has no place for {path} alone, {what}: save_adapters(adapters, path) keeps it"


def _bias_option(
    tuned: Mapping[str, Tensor], known: Iterable[Module], base: Mapping[str, Tensor], adapted: Collection[Module]
) -> tuple[str, set[str]]:
    """PEFT's `bias`, and the leaves that it covers."""
    every: set[str] = set()
    below: set[str] = set()
    for m in known:
        paths = base.keys() & m.tensor_mapping("bias").paths
        every |= paths
        if m in adapted:
            below |= paths
    for option, paths in (("all", every), ("lora_only", below)):
        if paths and paths <= tuned.keys():
            return option, paths
    return "none", set()


# ------------------------------------------------------------------------------------------------------------- reading


def read_tuned(
    plain: Mapping[str, Tensor],
    known: Mapping[str, Module],
    config: Mapping[str, Any],
    parts: Mapping[str, StackedParts],
    params: GPT,
) -> tuple[dict[str, Tensor], bool]:
    """The leaves of a file that are not the base's own, of its tensors `plain` that are no adapter's; and whether
    PEFT trained a copy of the embedding table.

    Raises InputError for a tensor that has no place in the model, or another shape.
    """
    base = unfuse_qkv(leaves(params), params.cfg)
    sizes = unfuse_qkv(leaves(abstract_params(params.cfg)), params.cfg) | base
    sizes.setdefault("head.w", sizes["wte.w"])
    leaves_by_path: dict[str, Tensor] = {}
    copied = False
    for name, x in plain.items():
        match = KEY.fullmatch(name)
        if match is None or match["module"] not in known:
            raise InputError(f"tensor {printable(name)} has no place in this model")
        if match["where"] == "original_module":  # which PEFT's copy stands in for
            continue
        m, ending = known[match["module"]], match["ending"]
        trained = _is_trained(m, match["where"], ending, config)
        tuned_leaves = (
            LEAVES.values() if match["where"] == "base_layer" else parts.get(match["module"], LEAVES.values())
        )
        if lost := [leaf for leaf in tuned_leaves if leaf not in LEAVES.values()]:
            raise InputError(f"the metadata names {short_repr(lost[0])} of {m.name}; expected w or b")
        copied |= trained and m.path == "wte"
        for path, y in _leaves_of(x, m, ending, sizes).items():
            if path == "head.w" and params.head is None and not trained:
                path = "wte.w"  # one table
            base_leaf = base.get(path)
            if LEAVES[ending] not in tuned_leaves or (not trained and base_leaf is not None and _same(y, base_leaf)):
                continue
            if path in leaves_by_path and not torch.equal(leaves_by_path[path], y):
                raise InputError(f"tensor {name} is there by another name too, with other values: expected one of them")
            leaves_by_path[path] = y
    return leaves_by_path, copied


def _is_trained(m: Module, where: str | None, ending: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT trained a tensor, or has merely written it."""
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(x, str) for x in saved):
        raise InputError(f"adapter_config.json: expected a list of names for modules_to_save, got {short_repr(saved)}")
    by_bias = ending == "bias" and config.get("bias") in ("all", "lora_only")
    whole = where is None and any(x and (m.name.endswith(x) or f".{x}." in f".{m.name}.") for x in saved)
    tied = where is None and m.path == "head" and bool(config.get("ensure_weight_tying"))  # which names one of the two
    return by_bias or whole or tied or where == "modules_to_save"


def _leaves_of(x: Tensor, m: Module, ending: str, sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    s = m.tensor_mapping(ending)
    if any(p not in sizes for p in s.paths):
        raise InputError(f"tensor {s.name} has no place in this model, whose {m.name} has no {ending}")
    expected = join_heads([torch.empty(sizes[p].shape, device="meta") for p in s.paths], s).shape
    if x.shape != expected:
        hint = ", as of another vocabulary" if m.path == "head" or m.embedding else ""
        raise InputError(f"tensor {s.name}: expected shape {list(expected)}, got {list(x.shape)}{hint}")
    parts = split(x.float(), s, [tuple(sizes[p].shape) for p in s.paths])
    return {path: part.contiguous() for path, part in zip(s.paths, parts, strict=True)}


def _same(x: Tensor, base_leaf: Tensor) -> bool:
    return base_leaf.device.type != "meta" and torch.equal(x.to(base_leaf), base_leaf)


def fused_as(tuned: Mapping[str, Tensor], params: GPT) -> dict[str, Tensor]:
    """`tuned` with q, k and v fused if `params` has them fused, and all three are there."""
    fused, base = dict(tuned), leaves(params)
    for path in [path for path in tuned if path not in base and ".attn.q." in path]:
        three = [path.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if (whole := path.replace(".attn.q.", ".attn.qkv.")) in base and all(p in fused for p in three):
            fused[whole] = torch.cat([fused.pop(p) for p in three])
    return fused


def one_table(adapters: Adapters, copied: bool, params: GPT) -> Adapters:
    """The adapters of PEFT's embedding and head, if `params` has one table for both; `copied` if the embedding's
    weights were trained as a copy.
    """
    if params.head is not None:
        return adapters
    table, head = adapters.get("wte.w"), adapters.get("head.w")
    if copied and isinstance(table, Tensor) and isinstance(head, Tensor) and torch.equal(table, head):
        return {path: x for path, x in adapters.items() if path != "head.w"}
    if _are_equal_loras(adapters.get("wte"), adapters.get("head")) and not copied and head is None:
        return {path: x for path, x in adapters.items() if path != "head"}
    alone = copied or ("wte" in adapters and "head" not in adapters)
    if not alone or head is not None:
        return adapters
    head_table = table if isinstance(table, Tensor) and not copied else dense(params.wte.w).float()
    return adapters | {"head.w": head_table}


def _are_equal_loras(x: Any, y: Any) -> bool:
    if not isinstance(x, LoRA) or not isinstance(y, LoRA):
        return False
    fields = [(lora.alpha, lora.rs, lora.dropout, lora.a.shape, lora.b.shape) for lora in (x, y)]
    return fields[0] == fields[1] and torch.equal(x.a, y.a) and torch.equal(x.b, y.b)
