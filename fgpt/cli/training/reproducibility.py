"""What a step that is computed a second time must be equal to: bits where a device gives them, else the same up to
rounding; and how equal bits are asked of a GPU.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch

from fgpt.cli.devices import resolve_device, resolve_dtype
from fgpt.errors import InputError
from fgpt.kernels.reproducibility import bitwise_reproducible
from fgpt.recipes import TrainingRecipe

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""How far loss and gradient norm of a step may differ where sums have no fixed order, relative to their size.

A step differs by some roundings, and AdamW passes them on: it divides each gradient by its own size, so that rounding
decides where a parameter goes whose gradient is near zero. Noise of 1e-6 in every gradient of lora-nano changed the
gradient norm by 2e-6 of it within 60 steps in float32, noise of 1e-3 by 3e-3 within 12 in bfloat16; what is compared
may be hundreds of steps after the checkpoint that it is computed from. Other rows change a loss by a tenth.
"""
CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""cuBLAS adds in a fixed order with one of these alone, and reads it when CUDA starts."""


def use_determinism(recipe: TrainingRecipe) -> None:
    """Turn torch's deterministic algorithms on, for this process, if the recipe asks for them on a GPU.

    Raises InputError if cuBLAS is configured otherwise.
    """
    if not recipe.deterministic or bitwise_reproducible(resolve_device(recipe.device)):
        return
    workspace = os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])
    if workspace not in DETERMINISTIC_WORKSPACES:
        raise InputError(
            f"{CUBLAS_WORKSPACE} is {workspace!r}: --deterministic needs {' or '.join(DETERMINISTIC_WORKSPACES)}; set "
            "it, or unset it"
        )
    torch.use_deterministic_algorithms(True)


def rounding(recipe: TrainingRecipe, device: torch.device) -> float:
    """How far a step that is computed again may differ, relative to its loss and gradient norm: 0 where it gives the
    same bits.
    """
    return 0.0 if bitwise_reproducible(device) else ROUNDING[resolve_dtype(recipe.dtype, device)]


def differing(logged: Mapping[str, Any], computed: Mapping[str, float], tolerance: float) -> list[str]:
    """The names of `computed` whose logged value differs by more than `tolerance`. The weight of a step is a sum of its
    data, and is always equal.
    """
    names: list[str] = []
    for name, value in computed.items():
        before = logged.get(name, value)
        limit = 0.0 if name == "weight" else tolerance * abs(before)
        if not (before == value or abs(before - value) <= limit):  # NaN differs
            names.append(name)
    return names
