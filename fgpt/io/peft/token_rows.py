"""Trainable tokens in PEFT's files: rows of the embedding, of the head, or of both.

peft_type           the rows of a module X, [n, d_model]              the ids, by adapter_config.json
TRAINABLE_TOKENS    X.trainable_tokens_delta                          token_indices, of all `target_modules`
LORA                X.token_adapter.trainable_tokens_delta            trainable_token_indices: of the embedding, or by X

Despite the name they are no differences, but stand in for the rows of the base. Where head and embedding are one table,
PEFT ties the head's to the embedding's if their ids are the same, as ours always are.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fgpt.adapter_trainable_tokens import TrainableTokens
from fgpt.adapter_types import Adapters
from fgpt.errors import InputError, short_repr
from fgpt.io.peft.modules import PREFIX, SCORE, Module, targets
from fgpt.model import GPT

INDICES, ALONE = "trainable_token_indices", "TRAINABLE_TOKENS"
KEY = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.default)?")
KEPT = "save_adapters(adapters, path) keeps it"


def split_tokens(adapters: Adapters) -> tuple[dict[str, TrainableTokens], Adapters]:
    """The trainable tokens by path, and the other adapters."""
    tokens = {path: x for path, x in adapters.items() if isinstance(x, TrainableTokens)}
    return tokens, {path: x for path, x in adapters.items() if path not in tokens}


# ------------------------------------------------------------------------------------------------------------- writing


def pack_tokens(
    tokens: Mapping[str, TrainableTokens], others: Collection[str], known: Iterable[Module], params: GPT
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What PEFT's two files hold of `tokens`, alone or, if there are others, beside a LoRA at the paths `others`.

    Raises InputError for rows that PEFT has no place for.
    """
    if not tokens:
        return {}, {}
    known = list(known)
    modules = {m.path: m for m in known if (m.embedding or m.path == "head") and m.name != SCORE}
    for path in tokens:
        if path not in modules:
            raise InputError(f"PEFT has no place for trainable tokens on {path}: {KEPT}")
        if f"{path}.w" in others:
            raise InputError(f"PEFT trains {path} as a whole or some of its rows, and not both: {KEPT}")
    tied = params.head is None and "wte" in tokens
    if tied and {"head", "head.w"} & {*others}:
        raise InputError(f"PEFT ties trainable tokens of a tied wte to the head, which has an adapter: {KEPT}")
    if tied and "head" in tokens and tokens["head"].ids == tokens["wte"].ids:
        raise InputError(f"PEFT ties rows of the head to those of a tied wte that have the same ids: {KEPT}")
    below = ".token_adapter" if others else ""
    tensors = {f"{modules[path].name}{below}.trainable_tokens_delta": x.rows for path, x in tokens.items()}
    if others:
        by_name: dict[str, list[int]] = {}
        for path, x in tokens.items():
            by_name[targets([modules[path]], known)[0]] = list(x.ids)
        return tensors, {INDICES: list(tokens["wte"].ids) if [*tokens] == ["wte"] else by_name}
    if len({x.ids for x in tokens.values()}) > 1:
        raise InputError(f"PEFT has one list of ids for wte and head, unless a LoRA is beside them: {KEPT}")
    if tied:  # as PEFT writes it
        tensors[f"{modules['head'].name}.trainable_tokens_delta"] = tokens["wte"].rows
    chosen = targets([modules[path] for path in tokens], known)
    return tensors, {
        "peft_type": ALONE,
        "token_indices": list(next(iter(tokens.values())).ids),
        "target_modules": chosen,
    }


# ------------------------------------------------------------------------------------------------------------- reading


def read_tokens(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], known: Mapping[str, Module], params: GPT
) -> tuple[dict[str, TrainableTokens], dict[str, Tensor]]:
    """The trainable tokens of a file by path, and its other tensors.

    Raises InputError for rows without ids, or ids without rows.
    """
    rows: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, x in tensors.items():
        match = KEY.fullmatch(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if match is None:
            rest[name] = x
            continue
        m = known.get(match["module"])
        if m is None or not (m.embedding or m.path == "head") or not x.is_floating_point() or x.ndim != 2:
            raise InputError(f"tensor {name}: expected rows of a floating dtype, [n, d_model], of embedding or head")
        if m.path in rows:
            raise InputError(f"tensor {name} is there by another name too: expected one of them")
        rows[m.path] = x.float()
    tied, tokens = params.head is None, dict[str, TrainableTokens]()
    ids = _ids(config, rows, known)
    if tied and "head" in rows and "wte" in ids:  # PEFT writes what is tied, but may not name it
        ids = {"head": ids["wte"]} | ids
    for path, x in rows.items():
        if path not in ids or len(ids[path]) != len(x):
            count = f"{len(ids[path])} ids" if path in ids else "none"
            raise InputError(f"{len(x)} rows of trainable tokens on {path}; adapter_config.json has {count}")
        if tied and path == "head" and ids[path] == ids.get("wte"):  # PEFT's are one parameter
            if "wte" not in rows or not torch.equal(x, rows["wte"]):
                raise InputError("rows of the head and of the embedding differ, and the model ties them")
            continue
        tokens[path] = TrainableTokens(x.contiguous(), ids[path])
    expected = {*tokens, *(["head"] if tied and "wte" in tokens and ids.get("head") == ids["wte"] else [])}
    if missing := [path for path in ids if path not in expected]:
        raise InputError(f"no rows of the trainable tokens on {missing[0]}, which adapter_config.json names")
    return tokens, rest


def _ids(config: Mapping[str, Any], rows: Iterable[str], known: Mapping[str, Module]) -> dict[str, tuple[int, ...]]:
    """The ids by path, as the config names them."""
    if config.get("peft_type") == ALONE:
        return dict.fromkeys(rows, _id_list("token_indices", config.get("token_indices")))
    value = config.get(INDICES)
    if value is None or value == [] or value == {}:
        return {}
    if not isinstance(value, dict):
        return {"wte": _id_list(INDICES, value)}
    ids: dict[str, tuple[int, ...]] = {}
    for name, numbers in value.items():
        matched = {m.path for full, m in known.items() if f".{full}".endswith(f".{name}")}
        if len(matched) != 1:
            raise InputError(f"adapter_config.json: {INDICES} names {short_repr(name)}, which is no embedding or head")
        ids[matched.pop()] = _id_list(INDICES, numbers)
    return ids


def _id_list(field: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(x) is int for x in value):
        raise InputError(f"adapter_config.json: expected a list of token ids for {field}, got {short_repr(value)}")
    return tuple(value)
