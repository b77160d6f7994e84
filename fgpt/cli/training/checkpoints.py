"""Checkpoints: the state of a training after a step, from which it resumes bit for bit.

runs/NAME/checkpoints/step-000120/
state.safetensors    the trained leaves, the optimizer's moments, the step
manifest.json        size and hash of each part, and the hashes of what the training reads

A checkpoint gets its name when all of it is written, in the place of an older one of that step. It is valid only with a
manifest, and with parts that agree with it. The order of the data and all random numbers need no file: they are
functions of the run's seed and the step.
"""

import hashlib
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgpt.cli.console import console
from fgpt.errors import InputError
from fgpt.io.files import atomic_dir, read_json, remove, write_json
from fgpt.io.safetensors_files import read_tensors, write_tensors
from fgpt.recipes import TrainingRecipe
from fgpt.train_step import State
from fgpt.tree import leaves, tree_map

FOLDER, STATE, MANIFEST = "checkpoints", "state.safetensors", "manifest.json"

Inputs = Mapping[str, str]
"""The hash of each thing that a training reads, by its name."""


class Checkpointer:
    """Saves a checkpoint every N minutes, after the last step, and at each best held-out loss."""

    def __init__(self, out: Path, recipe: TrainingRecipe, inputs: Inputs) -> None:
        self._out, self._recipe, self._inputs = out, recipe, inputs
        self._least_loss = least_loss(out)
        self._saved_at, self._saved_step = time.perf_counter(), 0

    def is_due(self, heldout_loss: float | None, is_last: bool) -> bool:
        """Whether the state after this step is to be saved."""
        is_best = heldout_loss is not None and heldout_loss < self._least_loss
        elapsed = time.perf_counter() - self._saved_at
        return is_best or is_last or elapsed >= 60 * self._recipe.checkpoint_every_minutes

    def save(self, state: State, heldout_loss: float | None) -> None:
        """Raises InputError as `save` does."""
        save(self._out, state, self._inputs, heldout_loss)
        self.prune()
        if heldout_loss is not None:
            self._least_loss = min(self._least_loss, heldout_loss)
        self._saved_at, self._saved_step = time.perf_counter(), int(state.step)

    def save_if_later(self, state: State) -> None:
        """Save a state of a later step than the last one that was saved, whose held-out loss stays with it."""
        if int(state.step) > self._saved_step:
            self.save(state, None)

    def prune(self) -> None:
        """Delete the checkpoints that the recipe does not keep."""
        prune(self._out, self._recipe.keep_checkpoints)


class NoCheckpointer:
    """Of a process that saves nothing, since another one does."""

    def is_due(self, heldout_loss: float | None, is_last: bool) -> bool:
        return False

    def save(self, state: State, heldout_loss: float | None) -> None:
        pass

    def save_if_later(self, state: State) -> None:
        pass

    def prune(self) -> None:
        pass


def save(out: Path, state: State, inputs: Inputs, heldout_loss: float | None = None) -> Path:
    """Write the checkpoint of `state` below `out`; `inputs` are the hashes of what the training reads.

    Raises InputError if the disk is full or the folder cannot be written; older checkpoints stay as they were.
    """
    folder = out / FOLDER / f"step-{int(state.step):06d}"
    with atomic_dir(folder) as partial:
        path = partial / STATE
        write_tensors(path, leaves(state))
        parts = {STATE: {"bytes": path.stat().st_size, "sha256": _sha256(path)}}
        manifest = {"step": int(state.step), "inputs": dict(inputs), "heldout_loss": heldout_loss, "parts": parts}
        write_json(partial / MANIFEST, manifest)
    return folder


def load_latest(out: Path, like: State, inputs: Inputs, max_step: int | None = None) -> State | None:
    """The state of the last checkpoint below `out`, or of the last one up to step `max_step`; None if there is none. A
    damaged or incomplete checkpoint is skipped, with a line that says so.

    Raises InputError for a checkpoint of other inputs, or of a state that is not shaped as `like`.
    """
    for folder in reversed(_folders(out)):
        if max_step is None or _step_of(folder) <= max_step:
            try:
                manifest = _verify(folder)
            except InputError as err:
                console.print(f"{err}: using the checkpoint before it", markup=False)
                continue
            return _load(folder, manifest, like, inputs)
    return None


def resume(out: Path, like: State, inputs: Inputs) -> State | None:
    """`load_latest`, and later checkpoints are deleted: they are damaged, and their steps are taken again.

    Raises InputError as `load_latest` does; then nothing is deleted.
    """
    state = load_latest(out, like, inputs)
    delete_after(out, 0 if state is None else int(state.step))
    return state


def delete_after(out: Path, step: int) -> None:
    """Delete the checkpoints of later steps."""
    for folder in _folders(out):
        if _step_of(folder) > step:
            remove(folder)


def best(out: Path) -> Path | None:
    """The checkpoint of the least held-out loss; None if none has one."""
    return next(iter(_by_loss(out)), None)


def least_loss(out: Path) -> float:
    """The held-out loss of the best checkpoint; infinity if there is none."""
    folder = best(out)
    manifest = _complete_manifest(folder) if folder else None
    return manifest["heldout_loss"] if manifest else math.inf


def load_best(out: Path, like: State, inputs: Inputs) -> State | None:
    """The state of the least held-out loss; None if no checkpoint has one. One that cannot be read is skipped, with a
    line that says so: the next best is used.
    """
    for folder in _by_loss(out):
        try:
            return _load(folder, _verify(folder), like, inputs)
        except InputError as err:
            console.print(f"{err}: it has the least held-out loss; using the next best", markup=False)
    return None


def prune(out: Path, keep: int) -> None:
    """Delete all checkpoints except the last `keep` complete ones and the best."""
    complete = [folder for folder in _folders(out) if _complete_manifest(folder)]
    retained = {*complete[-max(keep, 1) :], best(out)}
    for folder in _folders(out):
        if folder not in retained:
            if not folder.is_symlink():
                (folder / MANIFEST).unlink(missing_ok=True)  # first, so that a partly deleted one is not valid
            remove(folder)


def _folders(out: Path) -> list[Path]:
    folders = [path for path in (out / FOLDER).glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(folders, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _by_loss(out: Path) -> list[Path]:
    """The complete checkpoints that have a held-out loss, the best first, of equal ones the earliest."""
    ranked = []
    for folder in _folders(out):
        manifest = _complete_manifest(folder)
        loss = manifest["heldout_loss"] if manifest else None
        if loss is not None and math.isfinite(loss):
            ranked.append((loss, _step_of(folder), folder))
    return [folder for _, _, folder in sorted(ranked)]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, its parts not looked at; None if it is missing or malformed."""
    try:
        manifest = read_json(folder / MANIFEST)
    except InputError:
        return None
    types = {"step": int, "inputs": dict | str, "heldout_loss": float | None, "parts": dict}
    if not isinstance(manifest, dict):
        return None
    if not all(isinstance(manifest.get(name), kind) for name, kind in types.items()):
        return None
    if manifest["step"] != _step_of(folder) or manifest["parts"].keys() != {STATE}:
        return None
    return manifest if isinstance(manifest["parts"][STATE], dict) else None


def _complete_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint whose parts have the sizes it names; None for any other. Their content is not read,
    so this takes no time.
    """
    if (manifest := _read_manifest(folder)) is None:
        return None
    part = folder / STATE
    return manifest if part.is_file() and part.stat().st_size == manifest["parts"][STATE].get("bytes") else None


def _verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose parts have the sizes and hashes it names. Raises InputError for any other."""
    if (manifest := _read_manifest(folder)) is None:
        raise InputError(f"{folder} has no complete {MANIFEST}: its writing was interrupted")
    part = folder / STATE
    if _complete_manifest(folder) is None or manifest["parts"][STATE].get("sha256") != _sha256(part):
        raise InputError(f"{part} is missing or damaged")
    step = read_tensors(part, lambda name: name == "step").get("step")
    if step is None or step.numel() != 1 or int(step) != manifest["step"]:
        actual = "none" if step is None else step.tolist()
        raise InputError(f"{part} is of step {actual}, and its {MANIFEST} says {manifest['step']}")
    return manifest


def _load(folder: Path, manifest: dict[str, Any], like: State, inputs: Inputs) -> State:
    made_from = manifest["inputs"]
    if not isinstance(made_from, dict):
        raise InputError(
            f"{folder} was written by an earlier version, which did not record all of its inputs: begin a new run"
        )
    if any(re.fullmatch("[0-9a-f]{64}", str(x)) for x in made_from.values()):
        raise InputError(
            f"{folder} was written by an earlier version, which hashed its inputs by SHA-256: resume it with that "
            "version, or begin a new run"
        )
    changed = [name for name in dict.fromkeys([*inputs, *made_from]) if made_from.get(name) != inputs.get(name)]
    if changed:
        raise InputError(
            f"{folder} was made from other inputs than there are now; changed: {', '.join(changed)}. Restore them, or "
            "begin a new run"
        )
    stored, expected = read_tensors(folder / STATE), leaves(like)
    differing = _signatures(stored) ^ _signatures(expected)
    if differing:
        path = min(path for path, _, _ in differing)
        raise InputError(f"{folder / STATE} is not a state of this run ({path} differs): begin a new run")
    paths = iter(expected)  # in the order in which tree_map visits the leaves

    def restore(x: Tensor) -> Tensor:
        value = stored[next(paths)]
        return value if x.is_meta else value.to(x.device)  # a state that will be in parts stays on the host

    return tree_map(restore, like)


def _signatures(tensors: Mapping[str, Tensor]) -> set[tuple[str, torch.Size, torch.dtype]]:
    return {(path, x.shape, x.dtype) for path, x in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
