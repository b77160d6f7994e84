"""Adapters in PEFT's file formats, both ways: `adapter_config.json` and `adapter_model.safetensors`.

peft_type   ours                     tensors of a module
LORA        LoRA, or DoRA            lora_A [rank, in], lora_B [out, rank], lora_magnitude_vector [out]
IA3         IA3                      ia3_l: [out, 1] scales outputs, [1, in] the inputs of a feedforward module
LN_TUNING   tensors of norms         weight and, but for an RMSNorm, bias: the whole norm

A folder is of one type. What PEFT cannot hold, unions and tuned biases, `save_adapters` keeps.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fgpt._typing import StrPath
from fgpt.adapters import IA3, Adapters, DoRA, LoRA, adapt, layers
from fgpt.errors import InputError, one_line, printable, shown
from fgpt.io.files import read_json, read_metadata, read_tensors, write_json, write_tensors
from fgpt.io.peft_names import (
    PREFIX,
    Held,
    Module,
    by_turns,
    dropout_of,
    held,
    modules_of,
    named,
    stack,
    targets,
    thirds,
    unstack,
)
from fgpt.io.trees import fitted
from fgpt.model import GPT
from fgpt.tree import leaves

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HELD = "fgpt_held"
"""The entry of the file's metadata that says which parts of a module our adapters held, where not all of it."""

KEYS = {
    "LORA": r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?",
    "IA3": r"(?P<module>.+)\.(?P<part>ia3_l)(\.default)?",
    "LN_TUNING": r"(?P<module>.+)\.ln_tuning_layers(\.default)?\.(?P<part>weight|bias)",
}

LEAVES = (("w", "weight"), ("b", "bias"))
"""Our leaves of a norm, and the hub's."""

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights after which the adapter belongs to a base that was changed at the start."""
UNREAD = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "modules_to_save"),
    *("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora"),
)
"""Options that change the forward pass in ways that we have no adapter for."""


class Packed(NamedTuple):
    """What PEFT's two files hold."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    held: dict[str, Held]


# ------------------------------------------------------------------------------------------------------------- saving


def save_peft(adapters: Adapters, params: GPT, folder: StrPath, base: str) -> None:
    """Write `adapters` of the model `params`, known to others as `base`, so that `peft` loads them.

    Raises InputError for adapters that no format of PEFT's holds.
    """
    folder = Path(folder)
    tensors, config, parts = pack(adapters, params, base)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"} | ({HELD: json.dumps(parts)} if parts else {}))
    write_json(folder / CONFIG, config)


def pack(adapters: Adapters, params: GPT, base: str) -> Packed:
    """`adapters` as PEFT's files hold them.

    Raises InputError for adapters that do not fit `params`, or that no format of PEFT's holds.
    """
    adapt(params, adapters)  # a path or shape that does not fit is better met now than at loading
    known, weights = modules_of(params.cfg), layers(params)
    parts = _by_module(adapters, known)
    kinds = {next(c for c in (LoRA, DoRA, IA3, Tensor) if isinstance(x, c)) for x in adapters.values()}
    if len(kinds) != 1:
        names = ", ".join(sorted(c.__name__ for c in kinds)) or "nothing"
        raise InputError(f"no format of PEFT's holds {names} in one: save_adapters(adapters, path) does")
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    if kinds == {Tensor}:
        tensors, config, some = _pack_norms(parts, known, params)
    else:
        some = {m.name: held(x) for m, x in parts.items() if "" not in x}
        whole: dict[Module, Any] = {
            m: x[""] if "" in x else stack(x, {path[-1]: weights[path] for path in m.parts}) for m, x in parts.items()
        }
        make = _pack_ia3 if kinds == {IA3} else _pack_lora
        tensors, config = make({m: by_turns(x, m) for m, x in whole.items()}, known)
    return Packed({PREFIX + name: x for name, x in tensors.items()}, common | config, some)


def _by_module(adapters: Adapters, known: Iterable[Module]) -> dict[Module, dict[str, Any]]:
    """What is on each module: on q, k or v of one that is all three, on w or b of a norm, or on all of it, ""."""
    where = {path: m for m in known for path in (m.path, *m.parts)}
    parts: dict[Module, dict[str, Any]] = {}
    for path, x in adapters.items():
        m = where.get(path.rpartition(".")[0] if isinstance(x, Tensor) else path)
        if m is None or m.norm != isinstance(x, Tensor):
            why = ", as q, k and v are modules of their own" if path.endswith(".qkv") else ""
            raise InputError(f"PEFT has no place for an adapter on {path}{why}: save_adapters(adapters, path) keeps it")
        if isinstance(x, LoRA) and x.scaling is not None:
            raise InputError(f"the LoRA at {path} is of a stack: save what unstack(stacked) gives, each on its own")
        parts.setdefault(m, {})["" if path == m.path else path[-1]] = x
    return parts


def _pack_lora(
    whole: Mapping[Module, LoRA | DoRA], known: Iterable[Module]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    loras = {m.name: x.lora if isinstance(x, DoRA) else x for m, x in whole.items()}
    rs, dropout = all(x.rs for x in loras.values()), dropout_of(loras.values())
    ranks = {module: x.a.shape[0] for module, x in loras.items()}
    # where some are rank-stabilised and some are not, alpha alone says how strong each is
    alphas = {module: x.alpha if x.rs == rs else x.scale * ranks[module] for module, x in loras.items()}
    rank, alpha = (max(set(x.values()), key=list(x.values()).count) for x in (ranks, alphas))
    tensors = {f"{m}.lora_{side}.weight": t for m, x in loras.items() for side, t in (("A", x.a), ("B", x.b))}
    tensors |= {f"{m.name}.lora_magnitude_vector": x.m for m, x in whole.items() if isinstance(x, DoRA)}
    return tensors, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rs,
        "use_dora": any(isinstance(x, DoRA) for x in whole.values()),
        "bias": "none",
        "fan_in_fan_out": any(m.transposed for m in whole),
        "target_modules": targets(whole, known),
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(m): a for m, a in alphas.items() if a != alpha},
    }


def _pack_ia3(whole: Mapping[Module, IA3], known: Iterable[Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for m, x in whole.items():
        if (x.row is None) == (x.col is None):
            raise InputError(
                f"IA3 on {m.name} scales inputs and outputs, or neither: PEFT's scales one; "
                "save_adapters(adapters, path) keeps it"
            )
        if x.row is not None:
            tensors[f"{m.name}.ia3_l"] = x.row[:, None]
        elif x.col is not None:
            tensors[f"{m.name}.ia3_l"] = x.col[None]
    feedforward = targets([m for m, x in whole.items() if x.col is not None], known)
    others = targets([m for m, x in whole.items() if x.row is not None], known)
    return tensors, {
        "peft_type": "IA3",
        "fan_in_fan_out": any(m.transposed for m in whole),
        "target_modules": sorted(feedforward + others),
        "feedforward_modules": feedforward,
    }


def _pack_norms(
    modules: Mapping[Module, Mapping[str, Tensor]], known: Iterable[Module], params: GPT
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Held]]:
    """PEFT keeps whole norms: the leaf that is not tuned is the base's."""
    base = leaves(params)
    tensors: dict[str, Tensor] = {}
    some: dict[str, Held] = {}
    for m, parts in modules.items():
        has = {leaf: theirs for leaf, theirs in LEAVES if f"{m.path}.{leaf}" in base}  # an RMSNorm has no bias
        for leaf, theirs in has.items():
            x = parts[leaf] if leaf in parts else base[f"{m.path}.{leaf}"].float()
            tensors[f"{m.name}.ln_tuning_layers.{theirs}"] = x
        if len(parts) < len(has):
            some[m.name] = {leaf: [] for leaf in parts}
    return tensors, {"peft_type": "LN_TUNING", "target_modules": targets(modules, known)}, some


# ------------------------------------------------------------------------------------------------------------ loading


def load_peft(folder: StrPath, params: GPT) -> Adapters:
    """The adapters in `folder`, for the model `params` and on its device: LoRA, DoRA, IA3, or tensors of norms.

    A LoRA or DoRA on a module that is q, k and v in one, GPT-2's c_attn or GPT-NeoX's query_key_value, wants a fused
    base: `load_peft(folder, fuse(params))`; one that we stacked is unstacked on a base that is not fused, and IA3 on
    such a module becomes IA3 on q, on k and on v there.

    Raises InputError for files that are not PEFT's, hold what we have no adapter for, or do not fit the model.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in KEYS:
        raise InputError(f"{folder / CONFIG}: expected peft_type {', '.join(map(repr, KEYS))}, got {shown(kind)}")
    tensors, metadata = read_tensors(folder / WEIGHTS), read_metadata(folder / WEIGHTS)
    try:
        _refuse(config)
        found, parts = _modules(tensors, kind), _held(metadata.get(HELD, "{}"))
        known = named(modules_of(params.cfg))
        if lost := [name for name in [*found, *parts] if name not in known]:
            raise InputError(f"adapter on {printable(lost[0])}, which is no layer of this model")
        if len({known[name] for name in found}) < len(found):
            raise InputError("two adapters are on one layer, which has two names: expected one of them")
        adapters = (
            _norms(found, known, parts) if kind == "LN_TUNING" else _low(kind, found, known, config, parts, params)
        )
    except InputError as err:
        raise InputError(f"{folder}: {err}") from None
    return fitted(adapters, params, folder)


def _refuse(config: Mapping[str, Any]) -> None:
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING):
        raise InputError(
            f"init_lora_weights {init!r} belongs to a base that was changed at the start: convert it to a plain LoRA, "
            "save_pretrained(.., path_initial_model_for_weight_conversion=..)"
        )
    if used := [name for name in UNREAD if config.get(name)]:
        raise InputError(f"{used[0]} is {shown(config[used[0]])}, which has no adapter here; expected none")
    for name in ("use_dora", "use_rslora"):
        if not isinstance(config.get(name), bool | None):
            raise InputError(f"{CONFIG}: expected true or false for {name}, got {shown(config[name])}")


def _modules(tensors: Mapping[str, Tensor], kind: str) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + KEYS[kind], name)
        if match is None:
            raise InputError(f"tensor {name} is none of peft_type {kind!r}")
        if not x.is_floating_point():
            raise InputError(f"tensor {name}: expected a floating dtype, got {str(x.dtype).removeprefix('torch.')}")
        parts = modules.setdefault(match["module"], {})
        if match["part"] in parts:
            raise InputError(f"tensor {name} is there by another name too: expected one of them")
        parts[match["part"]] = x.float()
    if not modules:
        raise InputError(f"{WEIGHTS} holds no adapter")
    return modules


def _held(text: str) -> dict[str, Held]:
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError):
        parts = None
    if not isinstance(parts, dict) or not all(isinstance(x, dict) and x for x in parts.values()):
        raise InputError(f"{WEIGHTS}: metadata {HELD} is {shown(text)}; expected an object of objects")
    return parts


def _low(
    kind: str,
    modules: Mapping[str, Mapping[str, Tensor]],
    known: Mapping[str, Module],
    config: Mapping[str, Any],
    parts: Mapping[str, Held],
    params: GPT,
) -> Adapters:
    read: Callable[..., Any] = _lora if kind == "LORA" else _ia3
    adapters: Adapters = {}
    weights = layers(params)
    for name, tensors in modules.items():
        module = known[name]
        whole = by_turns(read(name, tensors, config), module, back=True)
        apart = {}
        if len(module.parts) > 1 and module.parts[0] in weights:  # q, k and v in one, and a base that is not fused
            apart = unstack(whole, parts[name]) if name in parts else thirds(whole) if isinstance(whole, IA3) else {}
        adapters |= {module.path.removesuffix("qkv") + x: part for x, part in apart.items()} or {module.path: whole}
    return adapters


def _lora(module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoRA | DoRA:
    names = ("lora_A", "lora_B", "lora_magnitude_vector") if config.get("use_dora") else ("lora_A", "lora_B")
    a, b, m = (tensors.get(name) for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    if (
        tensors.keys() != set(names)
        or a is None
        or b is None
        or (a.ndim, b.ndim, b.shape[-1]) != (2, 2, a.shape[0])
        or (m is not None and m.numel() != b.shape[0])
    ):
        got = {name: list(x.shape) for name, x in tensors.items()}
        raise InputError(f"{module} needs {' and '.join(names)}: [rank, in], [out, rank] and [out]; got {got}")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{CONFIG}: expected lora_dropout from 0 to less than 1, got {shown(dropout)}")
    rank = _chosen(config, module, "rank_pattern", "r")
    alpha = _chosen(config, module, "alpha_pattern", "lora_alpha")
    if not len(a) or (rank is not None and rank != len(a)):
        raise InputError(f"{module} has a lora_A of rank {len(a)}; {CONFIG} says {shown(rank)}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= 1e15:  # NaN is not
        raise InputError(f"{CONFIG}: expected a number for lora_alpha, got {shown(alpha)}")
    lora = LoRA(a, b, float(alpha), bool(config.get("use_rslora")), float(dropout))
    return lora if m is None else DoRA(lora, m.flatten())


def _chosen(config: Mapping[str, Any], module: str, patterns: str, default: str) -> Any:
    """What the first of `patterns` that a module's name matches says of it, else `default`."""
    found = config.get(patterns) or {}
    if not isinstance(found, dict):
        raise InputError(f"{CONFIG}: expected an object for {patterns}, got {shown(found)}")
    return next((x for pattern, x in found.items() if _matches(pattern, module)), config.get(default))


def _matches(pattern: str, module: str) -> bool:
    """Whether PEFT takes `pattern`, from a file, for the module's. RE2 reads it, in a time that grows with its length:
    with Python's own engine, a few characters can take for ever.
    """
    import pyarrow  # here, because importing fgpt must stay fast, and few adapters have patterns
    import pyarrow.compute

    compute: Any = pyarrow.compute
    try:
        return compute.match_substring_regex(pyarrow.scalar(module), pattern=rf"^(?:(.*\.)?({pattern}))$").as_py()
    except (pyarrow.ArrowException, ValueError) as err:
        raise InputError(f"{CONFIG}: {shown(pattern)} is not a regular expression: {one_line(err)}") from None


def _ia3(module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> IA3:
    x = tensors["ia3_l"]
    if x.ndim != 2 or 1 not in x.shape:
        raise InputError(f"{module} needs ia3_l [out, 1] or [1, in], got {list(x.shape)}")
    return IA3(row=x.flatten()) if x.shape[1] == 1 else IA3(col=x.flatten())


def _norms(
    modules: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, Module], parts: Mapping[str, Held]
) -> Adapters:
    adapters: Adapters = {}
    for name, tensors in modules.items():
        module, kept = known[name], parts.get(name, {"w": [], "b": []})
        if lost := [leaf for leaf in kept if leaf not in dict(LEAVES)]:
            raise InputError(f"metadata {HELD} names {shown(lost[0])} of {name}; expected w or b")
        if not module.norm:  # a Conv1D's weight is transposed, and may be square
            raise InputError(f"{name} is no norm of this model")
        adapters |= {f"{module.path}.{leaf}": tensors[x] for leaf, x in LEAVES if leaf in kept and x in tensors}
    return adapters
