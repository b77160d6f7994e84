"""Checkpoints: the state of a training after a step, from which it goes on bit for bit.

runs/NAME/checkpoints/step-000120/
state.safetensors    what is trained, the optimizer's moments, the step
manifest.json        size and hash of each part, and the hashes of what the training reads

A checkpoint takes its name when all of it is written, in the place of an older one of that step. It counts only with a
manifest and with parts that are as it says. The order of the data and all random numbers need no file: they are
functions of the run's seed and the step.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgpt.cli.console import console
from fgpt.errors import InputError
from fgpt.io.files import atomic_dir, read_json, remove, write_json
from fgpt.io.safetensors_files import read_tensors, write_tensors
from fgpt.train_step import State
from fgpt.tree import leaves, tree_map

FOLDER, STATE, MANIFEST = "checkpoints", "state.safetensors", "manifest.json"

Inputs = Mapping[str, str]
"""Of each thing that a training reads, its name and its hash."""


def save(out: Path, state: State, inputs: Inputs, heldout: float | None = None) -> Path:
    """Write the checkpoint of `state` below `out`; `inputs` are the hashes of what the training reads.

    Raises InputError where the disk is full or the folder cannot be written; older checkpoints stay as they were.
    """
    folder = out / FOLDER / f"step-{int(state.step):06d}"
    with atomic_dir(folder) as at:
        write_tensors(at / STATE, leaves(state))
        parts = {STATE: {"bytes": (at / STATE).stat().st_size, "sha256": _sha256(at / STATE)}}
        manifest = {"step": int(state.step), "inputs": dict(inputs), "heldout_loss": heldout, "parts": parts}
        write_json(at / MANIFEST, manifest)
    return folder


def load_latest(out: Path, like: State, inputs: Inputs, most: int | None = None) -> State | None:
    """The state of the last checkpoint below `out`, or of the last after `most` steps; None where there is none. One
    that is damaged or was not written to its end is passed over, with a line that says so.

    Raises InputError for a checkpoint of other inputs, or of a state that is not shaped as `like`.
    """
    for folder in reversed(_folders(out)):
        if most is None or _number(folder) <= most:
            try:
                manifest = _verify(folder)
            except InputError as err:
                console.print(f"{err}: going back to the one before it", markup=False)
                continue
            return _load(folder, manifest, like, inputs)
    return None


def resume(out: Path, like: State, inputs: Inputs) -> State | None:
    """`newest`, and what lies after it is deleted: it is damaged, and its steps are taken again.

    Raises InputError as `newest` does; then nothing is deleted.
    """
    state = load_latest(out, like, inputs)
    begin = 0 if state is None else int(state.step)
    for folder in _folders(out):
        if _number(folder) > begin:
            remove(folder)
    return state


def best(out: Path) -> Path | None:
    """The checkpoint of the least held-out loss; None where none has one."""
    return next(iter(_by_loss(out)), None)


def least_loss(out: Path) -> float:
    """The held-out loss of the best checkpoint; infinity where there is none."""
    found = best(out)
    manifest = _is_complete(found) if found else None
    return manifest["heldout_loss"] if manifest else math.inf


def load_best(out: Path, like: State, inputs: Inputs) -> State | None:
    """The state of the least held-out loss; None where no checkpoint has one. One that cannot be read is passed over,
    with a line that says so: the next best is taken.
    """
    for folder in _by_loss(out):
        try:
            return _load(folder, _verify(folder), like, inputs)
        except InputError as err:
            console.print(f"{err}: it would have been the best; taking the next best", markup=False)
    return None


def prune(out: Path, keep: int) -> None:
    """Delete all checkpoints but the last `keep` whole ones and the best."""
    whole = [folder for folder in _folders(out) if _is_complete(folder)]
    kept = {*whole[-max(keep, 1) :], best(out)}
    for folder in _folders(out):
        if folder not in kept:
            if not folder.is_symlink():
                (folder / MANIFEST).unlink(missing_ok=True)  # first, so that what is left of it counts for nothing
            remove(folder)


def _folders(out: Path) -> list[Path]:
    return sorted((p for p in (out / FOLDER).glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _by_loss(out: Path) -> list[Path]:
    """The whole checkpoints that have a held-out loss, the best first, of equals the earliest."""
    found = [(manifest["heldout_loss"], folder) for folder in _folders(out) if (manifest := _is_complete(folder))]
    judged = [(loss, _number(folder), folder) for loss, folder in found if loss is not None and math.isfinite(loss)]
    return [folder for _, _, folder in sorted(judged)]


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What a manifest says, its parts unseen; None where it is not there or not ours."""
    try:
        found = read_json(folder / MANIFEST)
    except InputError:
        return None
    wanted = {"step": int, "inputs": dict | str, "heldout_loss": float | None, "parts": dict}
    fits = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in wanted.items())
    if not fits or found["step"] != _number(folder) or found["parts"].keys() != {STATE}:
        return None
    return found if isinstance(found["parts"][STATE], dict) else None


def _is_complete(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint whose parts are as long as it says; None for any other. What is in them is unseen,
    which takes no time.
    """
    if (manifest := _manifest(folder)) is None:
        return None
    part = folder / STATE
    return manifest if part.is_file() and part.stat().st_size == manifest["parts"][STATE].get("bytes") else None


def _verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose parts are as it says. Raises InputError for any other."""
    if (manifest := _manifest(folder)) is None:
        raise InputError(f"{folder} has no whole {MANIFEST}, as one has that was written to its end")
    part = folder / STATE
    if _is_complete(folder) is None or manifest["parts"][STATE].get("sha256") != _sha256(part):
        raise InputError(f"{part} is missing or damaged")
    step = read_tensors(part, lambda name: name == "step").get("step")
    if step is None or step.numel() != 1 or int(step) != manifest["step"]:
        own = "none" if step is None else step.tolist()
        raise InputError(f"{part} is of step {own}, and its {MANIFEST} says {manifest['step']}")
    return manifest


def _load(folder: Path, manifest: dict[str, Any], like: State, inputs: Inputs) -> State:
    made_from = manifest["inputs"]
    if not isinstance(made_from, dict):
        raise InputError(
            f"{folder} was written by an earlier version, which did not record all that it had read: begin a new run"
        )
    changed = [name for name in dict.fromkeys([*inputs, *made_from]) if made_from.get(name) != inputs.get(name)]
    if changed:
        raise InputError(
            f"{folder} was made from other inputs than are there now; changed: {', '.join(changed)}. Put them back, or "
            "begin a new run"
        )
    found, wanted = read_tensors(folder / STATE), leaves(like)
    odd = {(path, x.shape, x.dtype) for path, x in found.items()} ^ {(p, x.shape, x.dtype) for p, x in wanted.items()}
    if odd:
        path = min(path for path, _, _ in odd)
        raise InputError(f"{folder / STATE} is not a state of this run ({path} differs): begin a new run")
    paths = iter(wanted)  # in the order in which tree_map goes over the leaves
    return tree_map(lambda x: found[next(paths)].to(x.device), like)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
