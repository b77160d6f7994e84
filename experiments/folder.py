"""A run's folder, runs/NAME: what was asked, what happened, and what came of it.

run.json       the resolved run               metrics.jsonl, loss.png   how the training went
adapter/       what was trained               compare.md, compare.html  base against tuned
model/         the whole model in the hub's layout, for full tuning and pretraining
eval.json      what `just eval` found         metrics.json, confusion.png   scores of a run that classifies

adapter/ is in PEFT's format where PEFT has one: LoRA, DoRA, IA3, norms. Else, for tuned biases or several kinds in one,
it holds a single file of our own.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from experiments.runs import Adapter, AnyRun, Run
from fgpt.adapters import Adapters, adapt, merge
from fgpt.data.sources import Columns
from fgpt.errors import InputError
from fgpt.io.files import read_json, write_json
from fgpt.io.hub import load, save
from fgpt.io.peft import load_peft, pack, save_peft
from fgpt.io.trees import load_adapters, save_adapters
from fgpt.model import GPT
from fgpt.tree import device, leaves, tree_map
from fgpt.weights import dtype

RUN, METRICS, LOSS, ADAPTER, MODEL = "run.json", "metrics.jsonl", "loss.png", "adapter", "model"
ADAPTERS = "adapters.safetensors"


def create(run: AnyRun) -> Path:
    """A new folder out/NAME, or out/NAME-2, -3, .. where earlier runs have left theirs.

    Raises InputError where it cannot be made.
    """
    for number in range(1, 10_000):
        folder = run.out / (run.name if number == 1 else f"{run.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as err:
            raise InputError(f"cannot make {folder}: {err.strerror}; choose another place with --out FOLDER") from None
        write_json(folder / RUN, dataclasses.asdict(run))
        return folder
    raise InputError(f"{run.out} holds 9999 runs named {run.name}: move some away")


def find(name: str, out: Path = Path("runs")) -> Path:
    """The folder of a finished run, by path, or the newest by name.

    Raises InputError where there is none, or it ended before it had anything to save.
    """
    numbered = (p for p in out.glob(f"{name}*") if re.fullmatch(rf"{re.escape(name)}(-\d+)?", p.name)) if name else ()
    found = [Path(name)] if name and (Path(name) / RUN).is_file() else sorted(numbered, key=lambda p: p.stat().st_mtime)
    finished = [p for p in found if (p / ADAPTER).is_dir() or (p / MODEL).is_dir()]
    if not finished:
        state = "none has finished" if found else "there is none"
        raise InputError(f"no trained run {name!r} under {out}/: {state}; train it first: just train {name or 'NAME'}")
    return finished[-1]


def read_run(folder: Path) -> Run:
    """The instruction run that made a folder. Raises InputError for any other."""
    values: Any = read_json(folder / RUN)
    try:
        nested = {
            "adapter": Adapter(**values["adapter"]),
            "columns": Columns(**values["columns"]),
            "out": Path(values["out"]),
        }
        return Run(**values | nested)
    except (TypeError, KeyError) as err:
        raise InputError(f"{folder / RUN}: not an instruction run of this version ({err}); train it again") from None


def save_tuned(folder: Path, params: GPT, adapters: Adapters, base: str) -> Path:
    """Keep what was trained: a whole model where every leaf was, else the adapters. Returns where."""
    if adapters.keys() == leaves(params).keys():
        save(merge(adapt(params, adapters)), folder / MODEL, like=base)
        return folder / MODEL
    try:
        pack(adapters, params, base)
    except InputError:  # PEFT cannot hold them
        save_adapters(adapters, folder / ADAPTER / ADAPTERS)
    else:
        save_peft(adapters, params, folder / ADAPTER, base)
    return folder / ADAPTER


def load_tuned(folder: Path, base: GPT) -> GPT:
    """`base`, made as the run made it, as the run in `folder` has tuned it: on its device, in its dtype."""
    if (folder / MODEL).is_dir():
        tuned, at = load(str(folder / MODEL), dtype(base.wte.w)), device(base)
        return tree_map(lambda x: x.to(at), tuned)
    if (folder / ADAPTER / ADAPTERS).is_file():
        return adapt(base, load_adapters(folder / ADAPTER / ADAPTERS, base))
    return adapt(base, load_peft(folder / ADAPTER, base))


def device_of(name: str) -> torch.device:
    """Raises InputError for a device that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise InputError(
            f"device {name!r} cannot be used ({str(err).splitlines()[0]}); leave --device out, or say cpu"
        ) from None
    return device
