"""What a sweep trains: every combination of the values that some options of a recipe have."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fgpt.cli.train_command import recipe_with_options
from fgpt.errors import InputError
from fgpt.recipes import AnyRecipe, FineTuningRecipe, GRPORecipe

SWEPT = {
    "--lr": "lr",
    "--weight-decay": "decay",
    "--warmup-steps": "warmup",
    "--adapter.rank": "rank",
    "--adapter.alpha": "alpha",
    "--seed": "seed",
}
"""The options that may have several values, and what names of members call them: numbers that are data of a step, and
what its initial state, its batches and its dropout are made from.
"""

Values = Mapping[str, str]
"""Of a member: an option and its value, as they were given."""


def split_values(args: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The options that have several values, with those values, and all other arguments.

    Raises InputError for a value that comes twice.
    """
    swept: dict[str, list[str]] = {}
    others: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        name = name.replace("_", "-")
        if name not in SWEPT:
            others.append(arg)
            continue
        values = [value] if equals else []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if name in swept or name in others:
            raise InputError(f"{name} is given twice: give it once, with all of its values")
        if len(values) < 2:
            others += [name, *values]
        else:
            swept[name] = _distinct(name, [x.strip() for x in values])
    return swept, others


def _distinct(name: str, values: list[str]) -> list[str]:
    """The values. Raises InputError if two of them are one number."""
    numbers: list[Any] = []
    for value in values:
        try:
            number = float(value)
        except ValueError:  # what is expected, the option itself says
            number = value
        if number in numbers:
            raise InputError(f"{name} has the value {value} twice: give each once")
        numbers.append(number)
    return values


def member_name(values: Values) -> str:
    """The folder of a member: lr-0.003-seed-1.

    >>> member_name({"--lr": "3e-3", "--seed": "1"})
    'lr-3e-3-seed-1'
    """
    return "-".join(f"{SWEPT[option]}-{value}" for option, value in values.items())


def combinations(swept: Mapping[str, Sequence[str]]) -> list[Values]:
    """Every combination of values, the last option varying fastest.

    >>> [member_name(x) for x in combinations({"--lr": ["1e-3", "3e-3"], "--seed": ["0", "1"]})]
    ['lr-1e-3-seed-0', 'lr-1e-3-seed-1', 'lr-3e-3-seed-0', 'lr-3e-3-seed-1']
    """
    return [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]


def member_recipes(name: str, args: Sequence[str], command: str) -> list[tuple[Values, AnyRecipe]]:
    """The recipe of each member, each with the member's name, and the values that it differs in.

    Raises InputError for arguments without a choice of values, for a recipe or options that a sweep cannot have, and as
    `recipe_with_options` does.
    """
    swept, others = split_values(args)
    _refuse_other_choices(others, command)
    if not swept:
        recipe_with_options(name, others, command)  # whose errors come first
        raise InputError(
            f"a sweep needs an option with several values: {command} --lr 1e-3 3e-3; they are {', '.join(SWEPT)}"
        )
    members: list[tuple[Values, AnyRecipe]] = []
    for values in combinations(swept):
        options = [part for pair in values.items() for part in pair]
        recipe = recipe_with_options(name, [*others, *options], command)
        members.append((values, replace(as_member(recipe, swept), name=member_name(values))))
    return members


def _refuse_other_choices(args: Sequence[str], command: str) -> None:
    """Raises InputError if an option that is one number, or one word, has several values."""
    single = {
        "--adapter.dropout": "dropout is part of the program",
        "--adapter.kind": "it changes the shape of what is trained",
        "--adapter.target": "it changes what is trained",
        "--max-seq-len": "it changes the shape of the batches",
        "--micro-batch-size": "it changes the shape of the batches",
        "--grad-accumulation-steps": "it changes the number of batches",
        "--optimizer": "it is another program",
        "--base": "members share one base",
        "--quantize": "members share one base",
        "--steps": "members take equally many steps",
        "--epochs": "members take equally many steps",
        "--template": "it changes the data",
    }
    for option, first, second in zip(args, args[1:], args[2:], strict=False):
        if option in single and not first.startswith("--") and not second.startswith("--"):
            raise InputError(
                f"{option} has several values, and {single[option]}: give one, and train the others by sweeps of their "
                f"own; of a sweep may differ {', '.join(SWEPT)}"
            )


def as_member(recipe: AnyRecipe, swept: Mapping[str, Sequence[str]]) -> AnyRecipe:
    """The recipe, if members can train it.

    Raises InputError for a recipe or options that members cannot have.
    """
    if not isinstance(recipe, FineTuningRecipe) or isinstance(recipe, GRPORecipe):
        what = "samples its batches from the policy" if isinstance(recipe, GRPORecipe) else "is a pretraining"
        raise InputError(f"{recipe.name} {what}: sweeps are of recipes that tune a base on batches that are given")
    refused = {
        "--early-stopping-patience": recipe.early_stopping_patience,
        "--keep-best": recipe.keep_best,
        "--tracker": recipe.tracker,
        "--streaming": getattr(recipe, "streaming", False),
        "--privacy.epsilon": recipe.privacy.epsilon,
        "--adapter.init": None if recipe.adapter.init == "default" else recipe.adapter.init,
        "--per-example": recipe.per_example,
    }
    if used := [option for option, value in refused.items() if value]:
        hint = "; a --pruner, halving or median, stops members early" if used[0] == "--early-stopping-patience" else ""
        raise InputError(f"{used[0]} is of a training by itself: leave it out of a sweep{hint}")
    if getattr(recipe, "objective", None) == "kto" and "--seed" in swept:
        raise InputError("KTO's rows make other numbers of micro-batches in another order: give one --seed")
    if recipe.compile or recipe.cuda_graphs:
        option = "--compile" if recipe.compile else "--cuda-graphs"
        raise InputError(f"{option} is of a training by itself, as members are mapped over: leave it out of a sweep")
    if "--adapter.rank" in swept:
        if recipe.adapter.kind not in ("lora", "dora"):
            raise InputError(f"--adapter.kind {recipe.adapter.kind} has no rank: leave out --adapter.rank")
        if recipe.optimizer == "adamw8bit":
            raise InputError(
                "--optimizer adamw8bit rounds moments in blocks, which ranks that are filled up would shift: give "
                "adamw, or one --adapter.rank"
            )
    if "--adapter.alpha" in swept and recipe.adapter.kind not in ("lora", "dora"):
        raise InputError(f"--adapter.kind {recipe.adapter.kind} has no alpha: leave out --adapter.alpha")
    return recipe
