"""A run's folder, runs/NAME: what was asked, what happened, and what came of it.

run.json       the resolved run               metrics.jsonl, loss.png   how the training went
adapter/       what was trained               compare.md, compare.html  base against tuned
model/         the whole model in the hub's layout, for full tuning and pretraining
eval.json      what `just eval` found         metrics.json, confusion.png   scores of a run that classifies
result.json    what a pretraining came to
status.json    whether it finished            environment.json          versions and machine at its start
checkpoints/   what --resume goes on from     tensorboard/              the figures again; report.html by `just report`
local.json     paths of this machine, where run.json has them shortened; all else can be shared

What a command finds later has a name of its own settings: compare-3-prompts.*, eval-TEXT.json, merged-original/.

adapter/ is in PEFT's format where PEFT has one: LoRA, DoRA, IA3, norms. Else, for tuned biases or several kinds in one,
it holds a single file of our own.
"""

import contextlib
import dataclasses
import difflib
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

import torch
from beartype.door import is_bearable
from filelock import FileLock, Timeout

from fgpt import ranges
from fgpt.adapters import Adapters, adapt, merge
from fgpt.classification_head import num_classes
from fgpt.cli.console import console
from fgpt.cli.environment import environment
from fgpt.cli.paths import shared, with_local, without_paths, write_local
from fgpt.errors import InputError, shown
from fgpt.io.files import atomic_dir, remove_leftovers, read_json, must_not_move, write_json
from fgpt.io.models import load, save
from fgpt.io.peft.adapter_files import load_peft, pack, save_peft
from fgpt.io.serialization import load_adapters, save_adapters
from fgpt.model import GPT
from fgpt.recipes import RECIPES, AnyRecipe, ClassificationRecipe, InstructionRecipe, PretrainingRecipe
from fgpt.tree import device, leaves, tree_map
from fgpt.weights import dtype

RUN, METRICS, LOSS, ADAPTER, MODEL = "run.json", "metrics.jsonl", "loss.png", "adapter", "model"
RESULT, SCORES, CONFUSION, EVAL = "result.json", "metrics.json", "confusion.png", "eval.json"
ADAPTERS = "adapters.safetensors"
STATUS, ENVIRONMENT, LOCK, CHECKPOINTS = "status.json", "environment.json", ".lock", "checkpoints"

WRITTEN_INTO = (LOCK, METRICS, CHECKPOINTS, "tensorboard", "wandb")
"""What a training adds to, where all else is replaced as a whole: none of it may be a link to somewhere else."""


@contextmanager
def open_run_dir(run: AnyRecipe, steps: int, where: Path | None = None) -> Iterator[Path]:
    """The folder of a run while it trains, which no other process can then train in: a new one, out/NAME, or NAME-2,
    -3, .. where earlier runs have left theirs; or `where`, that of a run which is taken up again.

    Raises InputError where it cannot be made, or another process is training in it.
    """
    folder = where or _new(run)
    _check_links(folder)
    lock = FileLock(folder / LOCK)  # let go of by the kernel, however the process ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{folder} is being trained in by another process: wait, or end that one") from None
    with lock, must_not_move(folder):
        status = {"state": "running", "steps": steps}
        write_json(folder / STATUS, status)
        if where is None:
            write_json(folder / ENVIRONMENT, environment())
            values = run.to_json()
            write_local(folder, values)
            write_json(folder / RUN, shared(values))  # last: a folder that has it has all of them
        else:
            for at in (folder, folder / ADAPTER, folder / MODEL, folder / CHECKPOINTS):
                remove_leftovers(at)
            _same_versions(folder)
        try:
            yield folder
        except KeyboardInterrupt:
            write_json(folder / STATUS, status | {"state": "interrupted"})
            raise
        except InputError as err:
            with contextlib.suppress(InputError):  # the disk may be full, which is then what `err` says
                write_json(folder / STATUS, status | {"state": "failed", "why": without_paths(str(err))})
            raise
        write_json(folder / STATUS, status | {"state": "finished"})


def _check_links(folder: Path) -> None:
    """Raises InputError where what a training writes into is a symbolic link, which leads out of the folder."""
    if linked := [name for name in WRITTEN_INTO if (folder / name).is_symlink()]:
        raise InputError(
            f"{folder / linked[0]} is a symbolic link, and nothing is written through one: put the file or folder "
            "itself in its place"
        )


LONGEST_NAME = 150
"""Bytes of a run's name: file systems take 255, some of which temporary names and numbers need."""


def check_name(name: str) -> None:
    """Raises InputError for a name of a run that is not the name of a single folder."""
    odd = "/" in name or "\\" in name or not name.isprintable() or name.strip() != name or name[:1] in (".", "-", "")
    if odd or len(name.encode("utf-8", "replace")) > LONGEST_NAME:
        raise InputError(
            f"the run's name is {shown(name)}: expected the name of one folder, of printable characters, with no / in "
            f"it, no . or - at its beginning, and at most {LONGEST_NAME} bytes; --out says where it lies"
        )


def _new(run: AnyRecipe) -> Path:
    check_name(run.name)
    for number in range(1, 10_000):
        folder = run.out / (run.name if number == 1 else f"{run.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as err:
            raise InputError(f"cannot make {folder}: {err.strerror}; choose another place with --out FOLDER") from None
        return folder
    raise InputError(f"{run.out} holds 9999 runs named {run.name}: move some away")


def _same_versions(folder: Path) -> None:
    """Say so where torch is another than at the run's start: its last bits may then be others too."""
    was, now = (_torch_of(x) for x in (read_json(folder / ENVIRONMENT), environment()))
    if was != now:
        console.print(f"begun with torch {was}, going on with {now}: the last digits may differ")


def _torch_of(environment: Any) -> Any:
    packages = environment.get("packages") if isinstance(environment, dict) else None
    return packages.get("torch") if isinstance(packages, dict) else None


def _of_name(name: str, out: Path) -> list[Path]:
    """The folder of a run, by path; or those by name, the newest last."""
    return [Path(name)] if name and (Path(name) / RUN).is_file() else _named(name, out)


def _named(name: str, out: Path) -> list[Path]:
    """The folders of runs of a name below `out`, the newest last."""
    numbered = re.compile(rf"{re.escape(name)}(-\d+)?")
    runs = (p.parent for p in out.glob(f"*/{RUN}"))
    found = (p for p in runs if name and numbered.fullmatch(p.name))
    return sorted(found, key=lambda p: (p / RUN).stat().st_mtime)  # a folder's own time changes with each report


def _taken(name: str, out: Path, chosen: Path, which: str = "") -> Path:
    """`chosen`; where several runs go by the name, a line says that it is this one, the newest `which`."""
    named = _named(name, out)
    others = [p for p in named if p.resolve() != chosen.resolve()]
    if others and chosen == Path(name):
        console.print(f"{name}: taking the folder ./{name}, and not {others[-1]}", markup=False, soft_wrap=True)
    elif others:
        said = f"{name}: taking {chosen}, of {len(named)} runs of that name the newest{which}"
        console.print(said, markup=False, soft_wrap=True)
    return chosen


def find_finished(name: str, out: Path = Path("runs")) -> Path:
    """The folder of a finished run, by path, or the newest by name.

    Raises InputError where there is none, or it ended before it had anything to save.
    """
    found = _of_name(name, out)
    finished = [p for p in found if (p / ADAPTER).is_dir() or (p / MODEL).is_dir()]
    if not finished:
        how = _to_finish(found[-1]) if found else f"there is none; {_to_begin(name, out)}"
        raise InputError(f"no trained run {name!r} under {out}/: {how}")
    return _taken(name, out, finished[-1], " that has finished")


def find_any(name: str, out: Path = Path("runs")) -> Path:
    """The folder of a run, by path, or the newest by name; it may be at work still, or have been killed.

    Raises InputError where there is none.
    """
    if found := _of_name(name, out):
        return _taken(name, out, found[-1])
    if name and Path(name).is_dir():
        raise InputError(f"{name} holds no {RUN}: expected the folder of a run")
    raise InputError(f"no run {name!r} under {out}/: {_did_you_mean(name, out)}expected a run's name, or its folder")


def find_unfinished(name: str, out: Path = Path("runs")) -> Path:
    """The folder of a run that was begun and has not finished, by path, or the newest by name.

    Raises InputError where there is none.
    """
    found = _of_name(name, out)
    unfinished = [p for p in found if _state(p) not in ("finished", None)]
    if not unfinished:
        if found:
            anew = f"; begin a new one: just train {name}" if name in RECIPES else ""
            raise InputError(f"nothing to resume: {found[-1]} has finished{anew}")
        raise InputError(f"nothing to resume: there is no run {name!r} under {out}/; {_to_begin(name, out)}")
    return _taken(name, out, unfinished[-1], " that has not finished")


def resume_command(folder: Path) -> str:
    """What goes on with a training, to be typed as it is."""
    return f"just train {shlex.quote(str(folder))} --resume"


def _to_finish(folder: Path) -> str:
    """What to do about a run that has left nothing to use."""
    if _state(folder) == "finished":
        return f"{folder} has neither {ADAPTER}/ nor {MODEL}/ any more; train it again"
    return f"{folder} has not finished; go on with it: {resume_command(folder)}"


def _to_begin(name: str, out: Path) -> str:
    """How there comes to be a run of a name: a recipe's, or one that was given by --name."""
    if name in RECIPES:
        return f"train it first: just train {name}"
    hint = _did_you_mean(name, out)
    return f"{hint}expected a run's name, or its folder; just train RECIPE makes one, and just runs lists the recipes"


def _did_you_mean(name: str, out: Path) -> str:
    near = difflib.get_close_matches(name, runs_in(out), n=1, cutoff=0.4)
    return f"did you mean {near[0]}? " if near else ""


def runs_in(out: Path = Path("runs")) -> list[str]:
    """The names of the runs in a folder."""
    return sorted(p.parent.name for p in out.glob(f"*/{RUN}"))


def use_of(folder: Path, run: AnyRecipe) -> str:
    """What a run is for, where it was taken for one of another kind."""
    if isinstance(run, InstructionRecipe):
        return f"it answers: just generate {shlex.quote(str(folder))} PROMPT"
    if isinstance(run, ClassificationRecipe):
        return "just classify tells its labels"
    model = shlex.quote(str(folder / MODEL))
    return f"tune it first, just train RECIPE --base {model}, or just eval --base {model} --text FILE"


def _state(folder: Path) -> str | None:
    """Whether a run is running, interrupted, failed or finished; None where an earlier version made it."""
    found = read_json(folder / STATUS) if (folder / STATUS).is_file() else None
    return found.get("state") if isinstance(found, dict) else None


def read_run(folder: Path) -> AnyRecipe:
    """The run that made a folder. Raises InputError for a folder of none, or of another version's."""
    values: Any = read_json(folder / RUN)
    if isinstance(values, dict):
        values = with_local(folder, values)
    for kind in (InstructionRecipe, ClassificationRecipe, PretrainingRecipe):
        if isinstance(values, dict) and values.keys() == {f.name for f in dataclasses.fields(kind)}:
            try:
                run = _read(kind, values)
                ranges.check(run)
                return run
            except InputError as err:
                raise InputError(f"{folder / RUN}: {err}; train it again") from None
    raise InputError(f"{folder / RUN}: not a run of this version; train it again")


def _read(kind: Any, value: Any, name: str = "run") -> Any:
    """`value` from JSON as a field of type `kind`. Raises InputError where it does not fit."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        fields = get_type_hints(kind)  # without the ranges of numbers, which are checked when all of it is read
        if value.keys() != fields.keys():
            raise InputError(f"{name} has the fields {', '.join(value)}; expected {', '.join(fields)}")
        return cast(Any, kind)(**{key: _read(fields[key], x, key) for key, x in value.items()})
    if get_origin(kind) is tuple and isinstance(value, list):
        value = tuple(_read(get_args(kind)[0], x, name) for x in value)
    elif Path in (kind, *get_args(kind)) and isinstance(value, str):
        value = Path(value)
    elif float in (kind, *get_args(kind)) and type(value) is int:
        value = float(value)
    hint: Any = kind
    if not is_bearable(value, hint):
        raise InputError(f"{name} is {value!r}; expected {getattr(kind, '__name__', kind)}")
    return value


def instruction_run(folder: Path) -> InstructionRecipe:
    """The instruction run that made a folder. Raises InputError for any other."""
    if not isinstance(run := read_run(folder), InstructionRecipe):
        raise InputError(f"{folder} is no run of instructions: {use_of(folder, run)}")
    return run


def save_tuned(folder: Path, params: GPT, adapters: Adapters, base: str) -> Path:
    """Keep what was trained: a whole model where every leaf was, else the adapters. Returns where.

    A classifier of which every leaf was trained is kept as adapters too: `merge` makes it the hub's.
    """
    whole = adapters.keys() == leaves(params).keys()
    if whole and num_classes(params) is None:
        with atomic_dir(folder / MODEL) as at:
            save(merge(adapt(params, adapters)), at, like=base)
        return folder / MODEL
    try:
        pack(adapters, params, base)
        held = not whole
    except InputError:  # PEFT cannot hold them
        held = False
    with atomic_dir(folder / ADAPTER) as at:
        if held:
            save_peft(adapters, params, at, base)
        else:
            save_adapters(adapters, at / ADAPTERS)
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
