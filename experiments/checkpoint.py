"""Checkpoints: the state of a training after a step, from which it goes on bit for bit.

runs/NAME/checkpoints/step-000120/
state.safetensors    what is trained, the optimiser's moments, the step
manifest.json        size and hash of each part, and what the training was made from; written last

A checkpoint counts only with its manifest and with parts that are as it says. The order of the data and all random
numbers need no file: they are functions of the run's seed and the step.
"""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from experiments.console import console
from fgpt.errors import InputError
from fgpt.io.files import read_json, read_tensors, write_json, write_tensors
from fgpt.train import State
from fgpt.tree import leaves, tree_map

FOLDER, STATE, MANIFEST = "checkpoints", "state.safetensors", "manifest.json"


def save(out: Path, state: State, inputs: str, heldout: float | None = None) -> Path:
    """Write the checkpoint of `state` below `out`; `inputs` is the hash of what the training was made from.

    Raises InputError where the disk is full or the folder cannot be written; older checkpoints stay as they were.
    """
    folder = out / FOLDER / f"step-{int(state.step):06d}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was taken up again before this step
    write_tensors(folder / STATE, leaves(state))
    parts = {STATE: {"bytes": (folder / STATE).stat().st_size, "sha256": _sha256(folder / STATE)}}
    write_json(folder / MANIFEST, {"step": int(state.step), "inputs": inputs, "heldout_loss": heldout, "parts": parts})
    return folder


def newest(out: Path, like: State, inputs: str, most: int | None = None) -> State | None:
    """The state of the last checkpoint below `out`, or of the last after `most` steps; None where there is none. One
    that is damaged or was not written to its end is passed over, with a line that says so.

    Raises InputError for a checkpoint of other inputs, or of a state that is not shaped as `like`.
    """
    for folder in reversed(_folders(out)):
        if most is None or _number(folder) <= most:
            try:
                manifest = _checked(folder)
            except InputError as err:
                console.print(f"{err}: going back to the one before it")
                continue
            return _read(folder, manifest, like, inputs)
    return None


def best(out: Path) -> Path | None:
    """The checkpoint of the least held-out loss; None where none has one."""
    found = [(m["heldout_loss"], folder) for folder in _folders(out) if (m := _manifest(folder))]
    return min(((loss, folder) for loss, folder in found if loss is not None), default=(None, None))[1]


def load(folder: Path, like: State, inputs: str) -> State:
    """The state of one checkpoint. Raises InputError where it is damaged, or of another training."""
    return _read(folder, _checked(folder), like, inputs)


def prune(out: Path, keep: int) -> None:
    """Delete all checkpoints but the last `keep` and the best."""
    kept = {*_folders(out)[-max(keep, 1) :], best(out)}
    for folder in set(_folders(out)) - kept:
        (folder / MANIFEST).unlink(missing_ok=True)  # first, so that what is left of it counts for nothing
        shutil.rmtree(folder, ignore_errors=True)


def _folders(out: Path) -> list[Path]:
    return sorted((p for p in (out / FOLDER).glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What a manifest says, its parts unseen; None where it is not there or not ours."""
    try:
        found = read_json(folder / MANIFEST)
    except InputError:
        return None
    wanted = {"step": int, "inputs": str, "heldout_loss": float | None, "parts": dict}
    fits = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in wanted.items())
    return found if fits and found["step"] == _number(folder) and found["parts"].keys() == {STATE} else None


def _checked(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose parts are as it says. Raises InputError for any other."""
    if (manifest := _manifest(folder)) is None:
        raise InputError(f"{folder} has no whole {MANIFEST}, as one has that was written to its end")
    for name, said in manifest["parts"].items():
        part = folder / name
        if not part.is_file() or said != {"bytes": part.stat().st_size, "sha256": _sha256(part)}:
            raise InputError(f"{part} is missing or damaged")
    return manifest


def _read(folder: Path, manifest: dict[str, Any], like: State, inputs: str) -> State:
    if manifest["inputs"] != inputs:
        raise InputError(
            f"{folder} was made from another base or other rows than are there now: put them back, or begin anew "
            "without --resume"
        )
    found, wanted = read_tensors(folder / STATE), leaves(like)
    odd = {(path, x.shape, x.dtype) for path, x in found.items()} ^ {(p, x.shape, x.dtype) for p, x in wanted.items()}
    if odd:
        path = min(path for path, _, _ in odd)
        raise InputError(f"{folder / STATE} is not a state of this run ({path} differs): begin anew without --resume")
    paths = iter(wanted)  # in the order in which tree_map goes over the leaves
    return tree_map(lambda x: found[next(paths)].to(x.device), like)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
