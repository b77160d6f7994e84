"""Recipes: what can be trained. Each is a function that returns a frozen dataclass and documents its results."""

import difflib
import re
from collections.abc import Callable
from typing import TypeAlias

from fgpt.errors import InputError
from fgpt.recipes import classification, data_to_text, grpo, instruction, preference, pretraining, reward
from fgpt.recipes.classification import ClassificationRecipe
from fgpt.recipes.data_to_text import DataToTextRecipe
from fgpt.recipes.grpo import GRPORecipe
from fgpt.recipes.instruction import InstructionRecipe
from fgpt.recipes.preference import PreferenceRecipe
from fgpt.recipes.pretraining import PretrainingRecipe
from fgpt.recipes.reward import RewardRecipe
from fgpt.recipes.training import TrainingRecipe
from fgpt.recipes.tuning import ADAPTER_DEFAULTS, Adapter, FineTuningRecipe, Privacy

__all__ = [
    "ADAPTER_DEFAULTS",
    "KINDS",
    "RECIPES",
    "SUPERVISED",
    "Adapter",
    "AnyRecipe",
    "ClassificationRecipe",
    "DataToTextRecipe",
    "FineTuningRecipe",
    "GRPORecipe",
    "InstructionRecipe",
    "PreferenceRecipe",
    "PretrainingRecipe",
    "Privacy",
    "RewardRecipe",
    "TrainingRecipe",
    "describe",
    "find",
]

AnyRecipe: TypeAlias = (
    InstructionRecipe
    | PreferenceRecipe
    | RewardRecipe
    | GRPORecipe
    | DataToTextRecipe
    | PretrainingRecipe
    | ClassificationRecipe
)

KINDS: dict[str, type[AnyRecipe]] = {
    recipe.kind: recipe
    for recipe in (
        InstructionRecipe,
        PreferenceRecipe,
        RewardRecipe,
        GRPORecipe,
        DataToTextRecipe,
        ClassificationRecipe,
        PretrainingRecipe,
    )
}
"""The classes of recipes by the name that run.json has for them."""

SUPERVISED: tuple[type[AnyRecipe], ...] = (InstructionRecipe, DataToTextRecipe, ClassificationRecipe)
"""The classes, not their subclasses, whose loss is a sum over the targets of known examples."""

RECIPES: dict[str, Callable[[], AnyRecipe]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        *instruction.RECIPES,
        *preference.RECIPES,
        *reward.RECIPES,
        *grpo.RECIPES,
        *data_to_text.RECIPES,
        *pretraining.RECIPES,
        *classification.RECIPES,
    )
}


def find(name: str) -> AnyRecipe:
    """The recipe of a name.

    Raises InputError if there is none.

    >>> find("lora-nano").base
    'nano'
    """
    if name not in RECIPES:
        similar = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean {similar[0]}? " if similar else ""
        raise InputError(f"no recipe named {name!r}; {hint}`fgpt recipes` lists them")
    return RECIPES[name]()


def describe(kind: str) -> list[tuple[str, str]]:
    """The name of each recipe of a kind, and the first sentence of its docstring.

    >>> describe("pretraining")[0][0]
    'pretrain-nano'
    """
    makers = [(name, make) for name, make in RECIPES.items() if make().kind == kind]
    paragraphs = [(name, (make.__doc__ or "").strip().partition("\n\n")[0]) for name, make in makers]
    return [(name, " ".join(re.split(r"(?<=\.)\s", text)[0].split())) for name, text in paragraphs]


def nearest(run: TrainingRecipe) -> str:
    """The name of the recipe that a run was made from: its own, else the recipe with the fewest other options.

    >>> import dataclasses
    >>> nearest(dataclasses.replace(find("dora-nano"), name="mine", lr=1e-3))
    'dora-nano'
    """
    if run.name in RECIPES:
        return run.name
    options = vars(run)

    def num_changes(name: str) -> int:
        defaults = vars(RECIPES[name]())
        return sum(defaults[field] != value for field, value in options.items())

    same_kind = [name for name, make in RECIPES.items() if make().kind == run.kind]
    return min(same_kind, key=num_changes)
