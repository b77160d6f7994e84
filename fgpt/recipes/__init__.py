"""The runs: functions that return what to do, as frozen dataclasses. Their docstrings say what to expect."""

import difflib
from collections.abc import Callable
from typing import TypeAlias

from fgpt.errors import InputError
from fgpt.recipes import classification, instruction, pretraining
from fgpt.recipes.classification import ClassificationRecipe
from fgpt.recipes.instruction import InstructionRecipe
from fgpt.recipes.pretraining import PretrainingRecipe
from fgpt.recipes.training import TrainingRecipe
from fgpt.recipes.tuning import ADAPTER_DEFAULTS, Adapter, FineTuningRecipe

__all__ = [
    "ADAPTER_DEFAULTS",
    "RECIPES",
    "Adapter",
    "AnyRecipe",
    "ClassificationRecipe",
    "FineTuningRecipe",
    "InstructionRecipe",
    "PretrainingRecipe",
    "TrainingRecipe",
    "describe",
    "find",
]

AnyRecipe: TypeAlias = InstructionRecipe | PretrainingRecipe | ClassificationRecipe

RECIPES: dict[str, Callable[[], AnyRecipe]] = {
    run.__name__.replace("_", "-"): run for run in (*instruction.RUNS, *pretraining.RUNS, *classification.RUNS)
}


def find(name: str) -> AnyRecipe:
    """Raises InputError for a name that is no run."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"no run named {name!r}; {hint}there are {', '.join(RECIPES)}")
    return RECIPES[name]()


def describe() -> list[tuple[str, str]]:
    """Each run's name and the first line of its docstring."""
    return [(name, (run.__doc__ or "").strip().splitlines()[0]) for name, run in RECIPES.items()]
