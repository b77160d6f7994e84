"""The runs: functions that return what to do, as frozen dataclasses. Their docstrings say what to expect."""

import difflib
from collections.abc import Callable
from typing import TypeAlias

from fgpt.errors import InputError
from fgpt.recipes import classification, instruction, pretraining
from fgpt.recipes.classification import Classify
from fgpt.recipes.instruction import Run
from fgpt.recipes.pretraining import Pretrain
from fgpt.recipes.training import Training
from fgpt.recipes.tuning import METHODS, Adapter, Tuning

__all__ = [
    "METHODS",
    "RUNS",
    "Adapter",
    "AnyRun",
    "Classify",
    "Pretrain",
    "Run",
    "Training",
    "Tuning",
    "describe",
    "find",
]

AnyRun: TypeAlias = Run | Pretrain | Classify

RUNS: dict[str, Callable[[], AnyRun]] = {
    run.__name__.replace("_", "-"): run for run in (*instruction.RUNS, *pretraining.RUNS, *classification.RUNS)
}


def find(name: str) -> AnyRun:
    """Raises InputError for a name that is no run."""
    if name not in RUNS:
        near = difflib.get_close_matches(name, RUNS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"no run named {name!r}; {hint}there are {', '.join(RUNS)}")
    return RUNS[name]()


def describe() -> list[tuple[str, str]]:
    """Each run's name and the first line of its docstring."""
    return [(name, (run.__doc__ or "").strip().splitlines()[0]) for name, run in RUNS.items()]
