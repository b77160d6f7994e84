"""Adapters in PEFT's file formats, both ways: `adapter_config.json` and `adapter_model.safetensors`.

peft_type   ours                     tensors of a module
LORA        LoRA, or DoRA            lora_A [rank, in], lora_B [out, rank], lora_magnitude_vector [out]; of an embedding
                                     lora_embedding_A = Bᵀ and lora_embedding_B = Aᵀ
IA3         IA3                      ia3_l: [out, 1] scales outputs, [1, in] the inputs of a feedforward module
LN_TUNING   tensors of norms         weight and, but for an RMSNorm, bias: the whole norm

TRAINABLE_TOKENS   trainable tokens      rows of the embedding or the head, beside a LoRA too (`token_rows`)

A folder is of one type, and beside it may hold whole modules and biases (`trained_tensors`). Every module of a LoRA has
one rank and one scale, lora_alpha / r, so that readers that know no more of the config read the same (`qkv_stacking`).
The task of a classifier is SEQ_CLS, and its head `score` is a module. What PEFT cannot hold, `save_adapters` keeps.
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fgpt._typing import StrPath
from fgpt.adapter_dora import DoRA, with_norms
from fgpt.adapter_ia3 import IA3
from fgpt.adapter_lora import LoRA
from fgpt.adapter_trainable_tokens import TrainableTokens
from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt
from fgpt.classification_head import num_classes
from fgpt.errors import InputError, printable, short_repr
from fgpt.io.files import read_json, write_json
from fgpt.io.peft.modules import LEAVES, PREFIX, SCORE, Module, by_name, modules_of, targets
from fgpt.io.peft.qkv_stacking import (
    StackedParts,
    commonest_scale,
    dropout_of,
    interleave_heads,
    pad_rank,
    split_qkv,
    stack_qkv,
    stacked_parts,
    total_rank,
    trim_rank,
    unstack_qkv,
)
from fgpt.io.peft.token_rows import ALONE, pack_tokens, read_tokens, split_tokens
from fgpt.io.peft.trained_tensors import KEY, both_sides, fused_as, one_table, pack_tuned, read_tuned
from fgpt.io.safetensors_files import read_metadata, read_tensors, write_tensors
from fgpt.io.serialization import check_fits
from fgpt.layers import weight_matrices
from fgpt.model import GPT
from fgpt.patterns import SECONDS, matching
from fgpt.tree import leaves

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PARTS_KEY = "fgpt_held"
"""Key of the file's metadata for what was stacked: the parts of a module that our adapters were on, if not all of it,
and their rank and alpha, if not the file's."""

KEYS = {
    "LORA": r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?",
    "IA3": r"(?P<module>.+)\.(?P<part>ia3_l)(\.default)?",
    "LN_TUNING": r"(?P<module>.+)\.ln_tuning_layers(\.default)?\.(?P<part>weight|bias)",
    ALONE: r"(?P<module>(?P<part>(?!)))",  # `read_tokens` takes what there is
}

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights after which the adapter belongs to a base that was changed at the start."""
UNSUPPORTED = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config"),
    *("target_parameters", "use_bdlora", "use_qalora"),
)
"""Options that change the forward pass in ways that we have no adapter for."""


class Packed(NamedTuple):
    """What PEFT's two files hold."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    parts: dict[str, StackedParts]


# ------------------------------------------------------------------------------------------------------------- saving


def save_peft(adapters: Adapters, params: GPT, folder: StrPath, base: str) -> None:
    """Write `adapters` of the model `params`, known to others as `base`, so that `peft` loads them. Of a `base` that is
    a local path its last part alone is written: what is shared names no place on this machine.

    LoRAs of several ranks are all padded to the largest.

    Args:
        adapters: LoRAs, DoRAs or IA3s of one kind, and tuned leaves beside them; trainable tokens, alone or beside
            LoRAs.
        params: The model that they fit.
        folder: Written with adapter_config.json and adapter_model.safetensors.
        base: Hub name or local path of the model; "owner/model@revision" writes the revision too.

    Raises:
        InputError: for adapters that no format of PEFT's holds.

    >>> import tempfile, fgpt
    >>> params = fgpt.load("nano")
    >>> adapters = fgpt.lora(params, fgpt.key(0), rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fgpt.save_peft(adapters, params, folder, "nano")
    ...     sorted(fgpt.load_peft(folder, params)) == sorted(adapters)
    True
    """
    folder = Path(folder)
    tensors, config, parts = pack(adapters, params, base)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"} | ({PARTS_KEY: json.dumps(parts)} if parts else {}))
    write_json(folder / CONFIG, config)


def pack(adapters: Adapters, params: GPT, base: str) -> Packed:
    """`adapters` as PEFT's files hold them.

    Raises InputError for adapters that do not fit `params`, or that no format of PEFT's holds.
    """
    norms = {path: x.m for path, x in adapters.items() if isinstance(x, DoRA)}  # any will do: of a base in parts too
    adapt(params, with_norms(adapters, norms))  # a path or shape that does not fit is better met now than at loading
    tokens, adapters = split_tokens(adapters)
    adapters = both_sides(adapters, params)
    classes = num_classes(params) is not None
    known = modules_of(params.cfg, classes)
    tuned = {path: x for path, x in adapters.items() if isinstance(x, Tensor)}
    parts = _by_module({path: x for path, x in adapters.items() if path not in tuned}, known)
    kinds = {type(x) for path, x in adapters.items() if path not in tuned}
    if others := kinds - {LoRA, DoRA, IA3}:
        names = ", ".join(sorted(c.__name__ for c in others))
        raise InputError(f"no file of PEFT's is written for {names}: save_adapters(adapters, path) keeps it")
    beside_tokens = kinds <= {LoRA, DoRA} and bool(kinds) == bool(adapters)
    if len(kinds) > 1 or not (adapters or tokens) or (tokens and not beside_tokens):
        others = kinds | ({TrainableTokens} if tokens else set()) | ({Tensor} if tokens and tuned else set())
        names = ", ".join(sorted(c.__name__ for c in others)) or "nothing"
        raise InputError(f"no format of PEFT's holds {names} in one: save_adapters(adapters, path) does")
    if classes and any(m.name == SCORE for m in parts):
        raise InputError(
            "PEFT keeps the head of a classifier whole, without an adapter: save_adapters(adapters, path) keeps this"
        )
    rows, config_of_rows = pack_tokens(tokens, adapters.keys(), known, params)
    if not adapters:
        tensors, config, partial = {}, {}, {}
    elif not kinds:
        tensors, config, partial = _pack_norms(tuned, known, params)
    else:
        make = _pack_ia3 if kinds == {IA3} else _pack_lora
        tensors, config, partial = make(parts, known, weight_matrices(params))
        beside = pack_tuned(tuned, known, params, parts.keys(), biased=kinds != {IA3})
        tensors, config, partial = tensors | beside.tensors, config | beside.config, partial | beside.parts
    common = {"task_type": "SEQ_CLS" if classes else "CAUSAL_LM", "inference_mode": True} | _named_base(base)
    tensors = {PREFIX + name: x for name, x in (tensors | rows).items()}
    return Packed(tensors, common | config | config_of_rows, partial)


def _named_base(base: str) -> dict[str, Any]:
    name, _, revision = base.partition("@")
    local = name.startswith(("/", "~", ".", "\\")) or Path(base).exists() or re.match(r"[A-Za-z]:[\\/]", name)
    if local:
        return {"base_model_name_or_path": re.split(r"[\\/]", base.rstrip("\\/"))[-1], "revision": None}
    return {"base_model_name_or_path": name, "revision": revision or None}


def _by_module(adapters: Adapters, known: Iterable[Module]) -> dict[Module, dict[str, Any]]:
    """What is on each module: on q, k or v of one that is all three, or on all of it, ""."""
    module_of = {path: m for m in known for path in (m.path, *m.parts)}
    parts: dict[Module, dict[str, Any]] = {}
    for path, x in adapters.items():
        m = module_of.get(path)
        if m is None or m.norm or (m.embedding and not isinstance(x, LoRA)):
            why = ", as q, k and v are modules of their own" if path.endswith(".qkv") else ""
            raise InputError(
                f"PEFT has no place for {type(x).__name__} on {path}{why}: save_adapters(adapters, path) keeps it"
            )
        if isinstance(x, LoRA) and x.scaling is not None:
            raise InputError(
                f"the LoRA at {path} is of a stack: save each adapter of unstack_adapters(stacked) on its own"
            )
        parts.setdefault(m, {})["" if path == m.path else path[-1]] = x
    return parts


Parts = Mapping[Module, Mapping[str, Any]]
Format = tuple[dict[str, Tensor], dict[str, Any], dict[str, StackedParts]]


def _pack_lora(parts: Parts, known: Iterable[Module], weights: Mapping[str, Any]) -> Format:
    loras = [x.lora if isinstance(x, DoRA) else x for each in parts.values() for x in each.values()]
    scale, dropout = commonest_scale(loras), dropout_of(loras)
    whole = {m: _module_adapter(m, x, weights, scale) for m, x in parts.items()}
    products = {m: x.lora if isinstance(x, DoRA) else x for m, x in whole.items()}
    rank = max(len(x.a) for x in products.values())
    alpha = scale * rank
    tensors: dict[str, Tensor] = {}
    for m, x in products.items():
        even = pad_rank(x, rank, scale)
        if m.embedding:
            tensors |= {f"{m.name}.lora_embedding_A": even.b.T, f"{m.name}.lora_embedding_B": even.a.T}
        else:
            tensors |= {f"{m.name}.lora_A.weight": even.a, f"{m.name}.lora_B.weight": even.b}
    tensors |= {f"{m.name}.lora_magnitude_vector": x.m for m, x in whole.items() if isinstance(x, DoRA)}
    plain = {m for m, x in products.items() if (len(x.a), x.alpha, x.rs) == (rank, alpha, False)}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": dropout,
        "use_rslora": False,
        "use_dora": any(isinstance(x, DoRA) for x in whole.values()),
        "bias": "none",
        "fan_in_fan_out": any(m.transposed for m in whole),
        "target_modules": targets(whole, known),
    }
    return tensors, config, {m.name: stacked_parts(x) for m, x in parts.items() if "" not in x or m not in plain}


def _module_adapter(m: Module, parts: Mapping[str, Any], weights: Mapping[str, Any], scale: float) -> Any:
    """The adapter of all of a module, whose rows are as the module has them."""
    own_weights = {path[-1]: weights[path] for path in m.parts} if "" not in parts else {}
    whole: Any = parts[""] if "" in parts else stack_qkv(parts, own_weights, scale)
    return interleave_heads(whole, m)


def _pack_ia3(parts: Parts, known: Iterable[Module], weights: Mapping[str, Any]) -> Format:
    whole: dict[Module, IA3] = {m: _module_adapter(m, x, weights, 1.0) for m, x in parts.items()}
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
    config = {
        "peft_type": "IA3",
        "fan_in_fan_out": any(m.transposed for m in whole),
        "target_modules": sorted(feedforward + others),
        "feedforward_modules": feedforward,
    }
    return tensors, config, {m.name: stacked_parts(x) for m, x in parts.items() if "" not in x}


def _pack_norms(tuned: Mapping[str, Tensor], known: Iterable[Module], params: GPT) -> Format:
    """PEFT keeps whole norms: the leaf that is not tuned is the base's."""
    base = leaves(params)
    norms = {m: [leaf for leaf in LEAVES.values() if f"{m.path}.{leaf}" in tuned] for m in known if m.norm}
    norms = {m: chosen for m, chosen in norms.items() if chosen}
    if not norms:
        raise InputError(
            f"PEFT has no place for {next(iter(tuned))} without an adapter or a norm beside it: "
            "save_adapters(adapters, path) keeps it"
        )
    tensors: dict[str, Tensor] = {}
    partial: dict[str, StackedParts] = {}
    for m, chosen in norms.items():
        has = {leaf: ending for ending, leaf in LEAVES.items() if f"{m.path}.{leaf}" in base}  # an RMSNorm has no bias
        for leaf, ending in has.items():
            path = f"{m.path}.{leaf}"
            tensors[f"{m.name}.ln_tuning_layers.{ending}"] = tuned[path] if path in tuned else base[path].float()
        if len(chosen) < len(has):
            partial[m.name] = {leaf: [] for leaf in chosen}
    rest = {path: x for path, x in tuned.items() if path.rpartition(".")[0] not in {m.path for m in norms}}
    beside = pack_tuned(rest, known, params, (), biased=False)
    config = {"peft_type": "LN_TUNING", "target_modules": targets(norms, known)} | beside.config
    return tensors | beside.tensors, config, partial | beside.parts


# ------------------------------------------------------------------------------------------------------------ loading


def load_peft(folder: StrPath, params: GPT) -> Adapters:
    """The adapters in `folder`, for the model `params` and on its device: LoRA, DoRA, IA3, trainable tokens, and tuned
    leaves.

    A LoRA or DoRA on a module that is q, k and v in one, GPT-2's c_attn or GPT-NeoX's query_key_value, needs a fused
    base: `load_peft(folder, fuse_qkv(params))`; one that we stacked is unstacked on a base that is not fused, and IA3
    on such a module becomes IA3 on q, on k and on v there.

    An adapter of the embedding or the head of a tied model is of that side alone. Where it is the embedding's, the head
    keeps the base's table as a leaf of the adapters, but not over `params.untie()`, which has a head of its own.

    The adapters of a classifier need a model of as many classes:
    `load_peft(folder, with_classification_head(params, n, key))`.

    Args:
        folder: With adapter_config.json and adapter_model.safetensors.
        params: The model, fused or not, of any dtype, quantized or not.

    Raises:
        InputError: for files that are not PEFT's, hold what we have no adapter for, or do not fit the model.

    >>> import tempfile, fgpt
    >>> params = fgpt.load("nano")
    >>> adapters = fgpt.lora(params, fgpt.key(0), rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fgpt.save_peft(adapters, params, folder, "nano")
    ...     sorted(fgpt.load_peft(folder, params)) == sorted(adapters)
    True
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in KEYS:
        raise InputError(f"{folder / CONFIG}: expected peft_type {', '.join(map(repr, KEYS))}, got {short_repr(kind)}")
    tensors, metadata = read_tensors(folder / WEIGHTS), read_metadata(folder / WEIGHTS)
    try:
        _check_supported(config)
        parts = _read_parts(metadata.get(PARTS_KEY, "{}"))
        known = by_name(modules_of(params.cfg, num_classes(params) is not None))
        _check_head(tensors, params)
        tokens, tensors = read_tokens(tensors, config, known, params)
        modules, plain = _modules(tensors, kind, known)
        if not modules and not tokens:
            raise InputError(f"{WEIGHTS} holds no adapter")
        if lost := [name for name in [*modules, *parts] if name not in known]:
            raise InputError(f"adapter on {printable(lost[0])}, which is no layer of this model")
        if len({known[name] for name in modules}) < len(modules):
            raise InputError("two adapters are on one layer, which has two names: expected one of them")
        low = (
            _read_norms(modules, known, parts)
            if kind == "LN_TUNING"
            else _read_adapters(kind, modules, known, config, parts, params)
        )
        tuned, copied = read_tuned(plain, known, config, parts, params)
        adapters = one_table(low | fused_as(tuned, params), copied, params)
        if twice := adapters.keys() & tokens.keys():
            raise InputError(f"{min(twice)} has an adapter and trainable tokens; expected one of them")
        adapters |= tokens
    except InputError as err:
        raise InputError(f"{folder}: {err}") from None
    return check_fits(adapters, params, folder)


def _check_head(tensors: Mapping[str, Tensor], params: GPT) -> None:
    """Raises InputError for a classifier's head over a model that has none of as many classes."""
    for name, x in tensors.items():
        match = KEY.fullmatch(name.removeprefix(PREFIX))
        if match is None or match["module"] != SCORE or x.ndim != 2 or len(x) == num_classes(params):
            continue
        reads = f"load_peft(folder, with_classification_head(params, {len(x)}, key)) reads it"
        raise InputError(f"it adapts a classifier of {len(x)} classes: {reads}")


def _check_supported(config: Mapping[str, Any]) -> None:
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING):
        raise InputError(
            f"init_lora_weights {init!r} belongs to a base that was changed at the start: convert it to a plain LoRA, "
            "save_pretrained(.., path_initial_model_for_weight_conversion=..)"
        )
    if used := [name for name in UNSUPPORTED if config.get(name)]:
        raise InputError(f"{used[0]} is {short_repr(config[used[0]])}, which has no adapter here; expected none")
    for name in ("use_dora", "use_rslora"):
        if not isinstance(config.get(name), bool | None):
            raise InputError(f"{CONFIG}: expected true or false for {name}, got {short_repr(config[name])}")


def _modules(
    tensors: Mapping[str, Tensor], kind: str, known: Mapping[str, Module]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each module's adapter, by module and part, and those that are no adapter's."""
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    plain: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise InputError(f"tensor {name}: expected a floating dtype, got {str(x.dtype).removeprefix('torch.')}")
        match = re.fullmatch(re.escape(PREFIX) + KEYS[kind], name)
        if match is None:
            below = KEY.fullmatch(name.removeprefix(PREFIX))
            if not name.startswith(PREFIX) or below is None or below["module"] not in known:
                raise InputError(f"tensor {name} is none of peft_type {kind!r}")
            plain[name.removeprefix(PREFIX)] = x
            continue
        parts = modules[match["module"]]
        if match["part"] in parts:
            raise InputError(f"tensor {name} is there by another name too: expected one of them")
        parts[match["part"]] = x.float()
    return modules, plain


def _read_parts(text: str) -> dict[str, StackedParts]:
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError):
        parts = None
    if not isinstance(parts, dict) or not all(isinstance(x, dict) and x for x in parts.values()):
        raise InputError(f"{WEIGHTS}: metadata {PARTS_KEY} is {short_repr(text)}; expected an object of objects")
    return parts


def _read_adapters(
    kind: str,
    modules: Mapping[str, Mapping[str, Tensor]],
    known: Mapping[str, Module],
    config: Mapping[str, Any],
    parts: Mapping[str, StackedParts],
    params: GPT,
) -> Adapters:
    read: Callable[..., Any] = _read_ia3
    if kind == "LORA":
        ranks = _by_pattern(config, "rank_pattern", "r", modules)
        alphas = _by_pattern(config, "alpha_pattern", "lora_alpha", modules)
        read = lambda name, tensors: _read_lora(known[name], tensors, config, ranks[name], alphas[name])  # noqa: E731
    adapters: Adapters = {}
    weights = weight_matrices(params)
    for name, tensors in modules.items():
        module, module_parts = known[name], parts.get(name, {})
        whole = interleave_heads(read(name, tensors), module, back=True)
        split: dict[str, Any] = {"": whole}
        if "" in module_parts or (len(module.parts) > 1 and module.parts[0] in weights):  # q, k and v in one over three
            split = (
                unstack_qkv(whole, module_parts)
                if module_parts
                else split_qkv(whole)
                if isinstance(whole, IA3)
                else split
            )
        elif module_parts and not isinstance(whole, IA3):
            split = {"": trim_rank(whole, total_rank(module_parts))}
        adapters |= {module.path.removesuffix("qkv") + x if x else module.path: part for x, part in split.items()}
    return adapters


def _read_lora(module: Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any], rank: Any, alpha: Any) -> Any:
    names = ("lora_embedding_A", "lora_embedding_B") if module.embedding else ("lora_A", "lora_B")
    names = (*names, "lora_magnitude_vector") if config.get("use_dora") else names
    a, b, m = (tensors.get(name) for name in (*names, "lora_magnitude_vector")[:3])
    if module.embedding and a is not None and b is not None:
        a, b = b.T, a.T
    if (
        tensors.keys() != set(names)
        or a is None
        or b is None
        or (a.ndim, b.ndim, b.shape[-1]) != (2, 2, a.shape[0])
        or (m is not None and m.numel() != b.shape[0])
    ):
        got = {name: list(x.shape) for name, x in tensors.items()}
        sizes = "[rank, rows], [out, rank]" if module.embedding else "[rank, in], [out, rank]"
        raise InputError(f"{module.name} needs {' and '.join(names)}: {sizes} and [out]; got {got}")
    if m is not None and module.embedding:
        raise InputError(f"DoRA of {module.name}: PEFT's has a magnitude for each column, ours one for each token")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{CONFIG}: expected lora_dropout from 0 to less than 1, got {short_repr(dropout)}")
    if not len(a) or (rank is not None and rank != len(a)):
        raise InputError(f"{module.name} has a lora_A of rank {len(a)}; {CONFIG} says {short_repr(rank)}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= 1e15:  # NaN is not
        raise InputError(f"{CONFIG}: expected a number for lora_alpha, got {short_repr(alpha)}")
    lora = LoRA(a.contiguous(), b.contiguous(), float(alpha), bool(config.get("use_rslora")), float(dropout))
    return lora if m is None else DoRA(lora, m.flatten())


def _by_pattern(config: Mapping[str, Any], patterns: str, default: str, modules: Iterable[str]) -> dict[str, Any]:
    """What the first of `patterns` that a module's name matches says of it, as PEFT reads them, else `default`."""
    by_pattern, names = config.get(patterns) or {}, list(modules)
    if not isinstance(by_pattern, dict):
        raise InputError(f"{CONFIG}: expected an object for {patterns}, got {short_repr(by_pattern)}")
    values = dict.fromkeys(names, config.get(default))
    end = time.monotonic() + SECONDS
    for pattern, value in reversed(by_pattern.items()):
        values |= dict.fromkeys(matching(rf"(.*\.)?({pattern})", names, f"{CONFIG}: {patterns}", end), value)
    return values


def _read_ia3(module: str, tensors: Mapping[str, Tensor]) -> IA3:
    x = tensors["ia3_l"]
    if x.ndim != 2 or 1 not in x.shape:
        raise InputError(f"{module} needs ia3_l [out, 1] or [1, in], got {list(x.shape)}")
    return IA3(row=x.flatten()) if x.shape[1] == 1 else IA3(col=x.flatten())


def _read_norms(
    modules: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, Module], parts: Mapping[str, StackedParts]
) -> Adapters:
    adapters: Adapters = {}
    for name, tensors in modules.items():
        module, tuned_leaves = known[name], parts.get(name, {"w": [], "b": []})
        if lost := [leaf for leaf in tuned_leaves if leaf not in LEAVES.values()]:
            raise InputError(f"metadata {PARTS_KEY} names {short_repr(lost[0])} of {name}; expected w or b")
        if not module.norm:  # a Conv1D's weight is transposed, and may be square
            raise InputError(f"{name} is no norm of this model")
        adapters |= {
            f"{module.path}.{leaf}": tensors[x] for x, leaf in LEAVES.items() if leaf in tuned_leaves and x in tensors
        }
    return adapters
