"""run.json: the recipe that a run directory was made by.

{"kind": "instruction", "version": 1, "name": "lora-nano", "base": "nano", ..}

Fields that are absent take their defaults, so that runs stay readable when recipes get new fields. A field that a
recipe does not have is an error, as training without it would be another training. Files from before version 1 have
neither kind nor version, and older names.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from beartype.door import is_bearable

from fgpt import ranges
from fgpt.adapter_defaults import ATTENTION
from fgpt.cli.paths import shareable_fields, with_full_paths, write_full_paths
from fgpt.errors import InputError, short_repr
from fgpt.io.files import read_json, write_json
from fgpt.recipes import KINDS, AnyRecipe, InstructionRecipe, TrainingRecipe

RUN = "run.json"
VERSION = 1
"""Of the format: raised if an older fgpt would misread what a newer one writes."""
DTYPE_BEFORE = "float32"
"""Of a pretraining that records none: there was no other. What the default is now may be another on this machine."""
TEMPLATE_BEFORE = "alpaca"
"""Of an instruction tuning that records none: its default was not the base's own."""
HEADER = ("kind", "version")
"""The entries that are no fields of the recipe."""

RENAMED = {
    "evaluate": "eval_every",
    "checkpoint": "checkpoint_every_minutes",
    "keep": "keep_checkpoints",
    "track": "tracker",
    "warmup": "warmup_steps",
    "seq": "max_seq_len",
    "rows": "micro_batch_size",
    "accumulate": "grad_accumulation_steps",
}
"""The fields that have other names in files without a version, by those names."""
RENAMED_IN = {
    "instruction": {
        "long": "overlong",
        "heldout": "num_heldout",
        "compare": "compare_prompts",
        "most": "max_new_tokens",
    },
    "classification": {
        "heldout": "num_heldout",
        "form": "head",
        "wording": "prompt",
        "shots": "num_fewshot",
        "also": "tune_also",
    },
    "pretraining": {"floor": "min_lr_ratio", "peak": "peak_tflops"},
}
"""Those of one kind of recipe."""
HEADS = {"classes": "classifier", "tokens": "lm"}
"""The values of `head` that have other names there."""


def write_run(folder: Path, run: TrainingRecipe) -> None:
    """Write run.json with shareable paths, and local.json with the full ones."""
    fields = run.to_json()
    write_full_paths(folder, fields)
    write_json(folder / RUN, {"kind": run.kind, "version": VERSION} | shareable_fields(fields))


def read_run(folder: Path) -> AnyRecipe:
    """The recipe of a run directory.

    Raises InputError for a run.json of an unknown kind or a newer version, and for fields that are unknown, missing or
    of a wrong type or range.
    """
    path = folder / RUN
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a recipe, got {short_repr(values)}")
    values = upgrade(values)
    recipe = recipe_class(path, values)
    fields = {"dtype": DTYPE_BEFORE} | with_full_paths(folder, recipe_fields(values))
    if recipe is InstructionRecipe:
        fields = {"template": TEMPLATE_BEFORE} | fields
    if recipe is InstructionRecipe and isinstance(data := fields.get("data"), str):
        fields["data"] = data.split("+")  # how several sources were written before they were a list
    if isinstance(adapter := fields.get("adapter"), dict) and "rs" not in adapter:
        fields |= _former_defaults(fields, adapter)
    try:
        run = _from_json(recipe, fields)
        ranges.check(run)
    except InputError as err:
        raise InputError(f"{path}: {err}; correct it, or train it again") from None
    return run


def _former_defaults(fields: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter and lr of a run from before adapters had `rs`, with what a field that is None meant then."""
    adapter = {"alpha": 16.0} | dict(adapter)
    if adapter.get("kind", "lora") not in ("lora", "dora"):
        return {"adapter": adapter}
    if adapter.get("target") is None:
        adapter["target"] = ATTENTION
    return {"adapter": adapter, "lr": 3e-4 if fields.get("lr") is None else fields["lr"]}


def recipe_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of run.json that are fields of the recipe."""
    return {name: value for name, value in upgrade(values).items() if name not in HEADER}


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a run.json without a version as version 1 has them; those of any other file unchanged.

    >>> upgrade({"name": "mine", "data": "alpaca", "seq": 512, "take": "best"})["keep_best"]
    True
    """
    if any(name in values for name in HEADER) or "seq" not in values:
        return dict(values)
    kind = "classification" if "train" in values else "pretraining" if "n_layer" in values else "instruction"
    names = RENAMED | RENAMED_IN[kind]
    fields: dict[str, Any] = {names.get(name, name): value for name, value in values.items()}
    if "take" in fields:
        fields["keep_best"] = fields.pop("take") == "best"
    for old, new in HEADS.items():
        if fields.get("head") == old:
            fields["head"] = new
    return {"kind": kind, "version": VERSION} | fields


def recipe_class(path: Path, values: Mapping[str, Any]) -> type[AnyRecipe]:
    """The class of the recipe that run.json holds. Raises InputError for an unknown kind or a newer version."""
    kind, version = values.get("kind"), values.get("version")
    if isinstance(version, int) and version > VERSION:
        raise InputError(f"{path}: version {version} is newer than this fgpt, which reads {VERSION}: upgrade fgpt")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{path}: expected a kind, one of {', '.join(KINDS)}, got {short_repr(kind)}; train it again")
    if type(version) is not int or version < 1:
        raise InputError(f"{path}: expected version {VERSION}, got {short_repr(version)}; train it again")
    return KINDS[kind]


def _from_json(type_: Any, value: Any, name: str = "") -> Any:
    """`value` from JSON as a field of type `type_`. Raises InputError if it does not fit."""
    if dataclasses.is_dataclass(type_) and isinstance(value, dict):
        return _dataclass_from_json(type_, value, name)
    if get_origin(type_) is tuple and isinstance(value, list):
        value = tuple(_from_json(get_args(type_)[0], x, name) for x in value)
    elif Path in (type_, *get_args(type_)) and isinstance(value, str):
        value = Path(value)
    elif float in (type_, *get_args(type_)) and int not in get_args(type_) and type(value) is int:
        value = float(value)
    hint: Any = type_
    if not is_bearable(value, hint):
        raise InputError(f"{name} is {short_repr(value)}: expected {getattr(type_, '__name__', type_)}")
    return value


def _dataclass_from_json(cls: Any, values: dict[str, Any], name: str) -> Any:
    prefix = f"{name}." if name else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types = get_type_hints(cls)  # without the ranges of numbers, which are checked at the end
    if unknown := [prefix + key for key in values if key not in fields]:
        raise InputError(f"unknown field {', '.join(map(short_repr, unknown))}: this version has no such option")
    if missing := [prefix + key for key, field in fields.items() if key not in values and _is_required(field)]:
        raise InputError(f"no field {', '.join(missing)}: expected a value")
    return cls(**{key: _from_json(types[key], value, prefix + key) for key, value in values.items()})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
