"""A run directory, runs/NAME: the recipe, the course of the training and its results.

run.json       the resolved recipe            metrics.jsonl, loss.png   a line of metrics for each step, and their plot
adapter/       the trained adapter            compare.md, compare.html  base and tuned model side by side
model/         the whole model in Hugging Face's layout, for full fine-tuning and pretraining
eval.json      results of `fgpt eval`         metrics.json, confusion.png   scores of a classifier
result.json    results of pretraining        per_example.jsonl       loss and gradient norm of each training row
status.json    running, finished, ..          environment.json          versions and machine at the start
checkpoints/   what --resume resumes from     tensorboard/              the metrics again; report.html by `fgpt report`
local.json     full paths of this machine, if run.json has them shortened; everything else can be shared

Results of other settings have names of their own: compare-3-prompts.*, eval-TEXT.json, merged-original/.

adapter/ is in PEFT's format if PEFT has one: LoRA, DoRA, IA3, norms. For tuned biases, or several kinds in one adapter,
it holds a single file of our own.
"""

import contextlib
import difflib
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt, merge
from fgpt.classification_head import num_classes
from fgpt.cli.console import console
from fgpt.cli.environment import environment
from fgpt.cli.paths import without_paths
from fgpt.cli.run_json import RUN, read_run, write_run
from fgpt.errors import InputError, short_repr
from fgpt.io import models
from fgpt.io.files import atomic_dir, must_not_move, read_json, remove_leftovers, write, write_json
from fgpt.io.models import CONFIG, load, save
from fgpt.io.peft.adapter_files import load_peft, pack, save_peft
from fgpt.io.serialization import load_adapters, save_adapters
from fgpt.model import GPT
from fgpt.recipes import RECIPES, AnyRecipe, FineTuningRecipe, InstructionRecipe, TrainingRecipe
from fgpt.sharding import has_sharded
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.tree import device, leaves
from fgpt.weights import dtype

R = TypeVar("R", bound=TrainingRecipe)

METRICS, LOSS, ADAPTER, MODEL = "metrics.jsonl", "loss.png", "adapter", "model"
PER_EXAMPLE = "per_example.jsonl"
MERGED = "merged"
"""The merged model of a run; over a quantized base -dequantized or -original follows, the base that was merged."""
RESULT, SCORES, CONFUSION, EVAL = "result.json", "metrics.json", "confusion.png", "eval.json"
ADAPTERS = "adapters.safetensors"
SWEEP = "sweep.json"
"""Of the folder of a sweep, which holds the run directories of its members."""
COMBINED = "combine.json"
"""Of a run that was combined of others: they, and how."""
REPORT = "report.html"
"""The page of a run, or of a sweep."""
STATUS, ENVIRONMENT, LOCK, CHECKPOINTS = "status.json", "environment.json", ".lock", "checkpoints"

APPENDED = (LOCK, METRICS, CHECKPOINTS, "tensorboard", "wandb")
"""Files and folders that a training writes into (others are replaced as a whole): no symbolic links."""


@contextmanager
def open_run_dir(
    run: AnyRecipe, steps: int, existing: Path | None = None, parameters: Mapping[str, int] | None = None
) -> Iterator[Path]:
    """A run directory, locked while a training runs in it: a new one, out/NAME, NAME-2, -3, .., or `existing`, that of
    a run that is resumed. status.json tells how it ends, and how many `parameters` are trained.

    Raises InputError if it cannot be made, or another process is training in it.
    """
    folder = existing or new_folder(run.out, run.name)
    if existing is None and folder.name != run.name:
        console.print(f"{run.out / run.name} exists: this run is {folder}", markup=False, soft_wrap=True)
    with lock_folder(folder), must_not_move(folder):
        status = {"state": "running", "steps": steps} | ({"parameters": dict(parameters)} if parameters else {})
        write_json(folder / STATUS, status)
        if existing is None:
            write_json(folder / ENVIRONMENT, environment())
            write_run(folder, run)  # last: a folder that has it has all of them
        else:
            if isinstance(run, FineTuningRecipe) and run.lengthened_at:
                write_run(folder, run)
            remove_leftovers_of_run(folder)
            _report_version_change(folder)
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


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a folder, whose files are its own: no symbolic links.

    Raises InputError if one does, or there are links.
    """
    _check_links(folder)
    lock = FileLock(folder / LOCK)  # released by the kernel however the process ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{folder} is being trained in by another process: wait, or stop that one") from None
    with lock:
        yield


def remove_leftovers_of_run(folder: Path) -> None:
    """Remove what a killed process has left half-written in a run directory."""
    for at in (folder, folder / ADAPTER, folder / MODEL, folder / CHECKPOINTS):
        remove_leftovers(at)


def _check_links(folder: Path) -> None:
    """Raises InputError if a training would write through a symbolic link, out of its folder."""
    if linked := [name for name in APPENDED if (folder / name).is_symlink()]:
        raise InputError(
            f"{folder / linked[0]} is a symbolic link, which fgpt does not write through: replace it by the file or "
            "folder itself"
        )


LONGEST_NAME = 150
"""Bytes of a run's name: file systems take 255, some of which temporary names and numbers need."""


def check_name(name: str) -> None:
    """Raises InputError for a run name that is not the name of one folder."""
    unfit = "/" in name or "\\" in name or not name.isprintable() or name.strip() != name or name[:1] in (".", "-", "")
    if unfit or len(name.encode("utf-8", "replace")) > LONGEST_NAME:
        raise InputError(
            f"the run's name is {short_repr(name)}: expected the name of one folder, printable characters without /, "
            f"not starting with . or -, at most {LONGEST_NAME} bytes; --out sets the folder it is in"
        )


def check_out(out: Path) -> None:
    """Raises InputError for a folder of runs that cannot be made or written to, before a training is prepared."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        reason = f"{nearest} is a file"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        reason = f"{nearest} may not be written to"
    else:
        return
    raise InputError(f"cannot make {out}: {reason}; choose another place with --out FOLDER")


def new_folder(out: Path, name: str) -> Path:
    """out/NAME, or the first of NAME-2, -3, .. that does not exist; it is made.

    Raises InputError if it cannot be made, or for a name that no folder can have.
    """
    check_name(name)
    for number in range(1, 10_000):
        folder = out / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as err:
            raise InputError(f"cannot make {folder}: {err.strerror}; choose another place with --out FOLDER") from None
        return folder
    raise InputError(f"{out} holds 9999 runs named {name}: move some away")


def _report_version_change(folder: Path) -> None:
    """Print if the version of torch has changed since the run's start: the last bits may then differ."""
    before, now = (_torch_version(x) for x in (read_json(folder / ENVIRONMENT), environment()))
    if before != now:
        console.print(f"started with torch {before}, resuming with {now}: the last digits may differ")


def _torch_version(environment: Any) -> Any:
    packages = environment.get("packages") if isinstance(environment, dict) else None
    return packages.get("torch") if isinstance(packages, dict) else None


def _candidates(name: str, out: Path) -> list[Path]:
    """The run directory at a path, or those of a name, the newest last."""
    return [Path(name)] if name and (Path(name) / RUN).is_file() else runs_named(name, out)


def runs_named(name: str, out: Path) -> list[Path]:
    """The run directories of a name in `out`, the newest last."""
    numbered = re.compile(rf"{re.escape(name)}(-\d+)?")
    return [folder for folder in run_dirs(out) if name and numbered.fullmatch(folder.name)]


def _announce_choice(name: str, out: Path, chosen: Path, which: str = "") -> Path:
    """`chosen`, and a line that names it if there are several runs of that name; it is the newest `which`."""
    runs = runs_named(name, out)
    others = [folder for folder in runs if folder.resolve() != chosen.resolve()]
    if others and chosen == Path(name):
        console.print(f"{name}: taking the folder ./{name}, and not {others[-1]}", markup=False, soft_wrap=True)
    elif others:
        choice = f"{name}: taking {chosen}, of {len(runs)} runs of that name the newest{which}"
        console.print(choice, markup=False, soft_wrap=True)
    return chosen


def is_model(name: str, out: Path = Path("runs")) -> bool:
    """Whether a name is no run's, and may be that of a model: an embedded one, a folder of one, a GGUF file, or a name
    on the Hub, OWNER/NAME or that of a GPT-2.
    """
    if _candidates(name, out) or (Path(name) / SWEEP).is_file():
        return False
    if Path(name).exists():
        return Path(name).suffix == ".gguf" or (Path(name) / CONFIG).is_file()
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?|gpt2(-\w+)?", name)
    return name in models.EMBEDDED or name in models.PACKAGED or (bool(on_hub) and not name.startswith("runs/"))


def check_base(base: str) -> None:
    """Raises InputError for a run directory where a model is expected, with the model that it has or can have."""
    folder = Path(base)
    if not (folder / RUN).is_file() or (folder / CONFIG).is_file():
        return
    saved = [path for path in (folder / MODEL, folder / MERGED) if (path / CONFIG).is_file()]
    merged = f"fgpt merge {shlex.quote(base)} makes {folder / MERGED}"
    instead = f"give its model, {saved[0]}" if saved else f"merge it first, {merged}"
    raise InputError(f"{base} is a run, and no model: {instead}; or train its adapter on with --adapter.init {base}")


def find_finished(name: str, out: Path = Path("runs")) -> Path:
    """The directory of a finished run, by path, or the newest of a name.

    Raises InputError if there is none, or it ended before it saved anything.
    """
    runs = _candidates(name, out)
    finished = [folder for folder in runs if (folder / ADAPTER).is_dir() or (folder / MODEL).is_dir()]
    if not finished:
        _refuse_sweep(name, out)
        how = _how_to_finish(runs[-1]) if runs else _how_to_start(name, out)
        raise InputError(f"no trained run {name!r} under {out}/: {how}")
    return _announce_choice(name, out, finished[-1], " that has finished")


def find_any(name: str, out: Path = Path("runs")) -> Path:
    """The directory of a run, by path, or the newest of a name; it may still be running, or have been killed.

    Raises InputError if there is none.
    """
    if runs := _candidates(name, out):
        return _announce_choice(name, out, runs[-1])
    _refuse_sweep(name, out)
    if name and Path(name).is_dir():
        raise InputError(f"{name} holds no {RUN}: expected the folder of a run")
    raise InputError(f"no run {name!r} under {out}/: {_did_you_mean(name, out)}expected a run's name, or its folder")


def _refuse_sweep(name: str, out: Path) -> None:
    """Raises InputError if the name is that of a sweep."""
    for folder in (Path(name), out / name):
        if name and (folder / SWEEP).is_file():
            members = sorted(run_dirs(folder))
            example = f", such as {members[0]}" if members else ""
            raise InputError(f"{folder} is a sweep: give one of its {len(members)} members{example}")


def find_unfinished(name: str, out: Path = Path("runs")) -> Path:
    """The directory of a run that was started and has not finished, by path, or the newest of a name.

    Raises InputError if there is none.
    """
    runs = _candidates(name, out)
    unfinished = [folder for folder in runs if read_state(folder) not in ("finished", None)]
    if not unfinished:
        _refuse_sweep(name, out)
        if runs:
            restart = f"start a new one: fgpt train {name}, or " if name in RECIPES else ""
            raise InputError(
                f"nothing to resume: {runs[-1]} has finished; {restart}lengthen it by more --steps or --epochs"
            )
        raise InputError(f"nothing to resume: there is no run {name!r} under {out}/; {_how_to_start(name, out)}")
    return _announce_choice(name, out, unfinished[-1], " that has not finished")


def resume_command(folder: Path) -> str:
    """The command that resumes a training, to be typed as it is."""
    return f"fgpt train {shlex.quote(str(folder))} --resume"


def _how_to_finish(folder: Path) -> str:
    """What to do about a run that has not saved anything."""
    if read_state(folder) == "finished":
        return f"{folder} has neither {ADAPTER}/ nor {MODEL}/ any more; train it again"
    return f"{folder} has not finished; resume it: {resume_command(folder)}"


def _how_to_start(name: str, out: Path) -> str:
    """What to do if there is no run of a name."""
    if name in RECIPES:
        return f"train it first: fgpt train {name}"
    hint = _did_you_mean(name, out)
    return f"{hint}fgpt runs lists them, and fgpt train RECIPE makes one"


def _did_you_mean(name: str, out: Path) -> str:
    similar = difflib.get_close_matches(name, run_names(out), n=1, cutoff=0.4)
    return f"did you mean {similar[0]}? " if similar else ""


def run_dirs(out: Path = Path("runs")) -> list[Path]:
    """The run directories in a folder, the newest last."""
    folders = [path.parent for path in out.glob(f"*/{RUN}")]
    return sorted(folders, key=lambda folder: (folder / RUN).stat().st_mtime)  # reports change a folder's own time


def sweep_dirs(out: Path = Path("runs")) -> list[Path]:
    """The folders of sweeps in a folder, the newest last."""
    folders = [path.parent for path in out.glob(f"*/{SWEEP}")]
    return sorted(folders, key=lambda folder: (folder / SWEEP).stat().st_mtime)


def run_names(out: Path = Path("runs")) -> list[str]:
    """The names of the runs in a folder, sorted."""
    return sorted(folder.name for folder in run_dirs(out))


def read_state(folder: Path) -> str | None:
    """running, interrupted, failed or finished; None if there is no status.json."""
    status = read_json(folder / STATUS) if (folder / STATUS).is_file() else None
    return status.get("state") if isinstance(status, dict) else None


def read_run_as(folder: Path, recipe_class: type[R], description: str) -> R:
    """The recipe of a run directory, of this class. Raises InputError for any other: it is not what the description
    says.
    """
    recipe = read_run(folder)
    if not isinstance(recipe, recipe_class):
        raise InputError(f"{folder} is not {description}: {recipe.suggest_use(folder)}")
    return recipe


def instruction_run(folder: Path) -> InstructionRecipe:
    """The recipe of an instruction-tuned run. Raises InputError for any other run."""
    return read_run_as(folder, InstructionRecipe, "an instruction-tuned run")


def save_tuned(folder: Path, params: GPT, adapters: Adapters, base: str, tokenizer: Tokenizer | None = None) -> Path:
    """Save what was trained, and return where: the whole model if every parameter was trained, else the adapters.

    A classifier is always saved as adapters: `merge` exports it in Hugging Face's layout. A `tokenizer` other than the
    base's is saved beside.
    """
    are_leaves = all(isinstance(x, Tensor) for x in adapters.values())
    whole = are_leaves and adapters.keys() == leaves(adapt(params, adapters)).keys()
    if whole and num_classes(params) is None:
        with atomic_dir(folder / MODEL) as partial:
            save(merge(adapt(params, adapters)), partial, like=tokenizer or base)
        return folder / MODEL
    try:
        pack(adapters, params, base)
        in_peft_format = not whole
    except InputError:  # PEFT has no format for them
        in_peft_format = False
    with atomic_dir(folder / ADAPTER) as partial:
        if in_peft_format:
            save_peft(adapters, params, partial, base)
        else:
            save_adapters(adapters, partial / ADAPTERS)
        for name, content in ({} if tokenizer is None else tokenizer.files()).items():
            write(partial / name, content)
    return folder / ADAPTER


def load_tuned(folder: Path, base: GPT) -> GPT:
    """The tuned model of a run, on the device and in the dtype of `base`, the base that it was trained on."""
    if (folder / MODEL).is_dir():
        return load(str(folder / MODEL), dtype(base.wte.w), device=device(base), shard=has_sharded(base))
    return adapt(base, load_adapters_of(folder, base))


def load_adapters_of(folder: Path, base: GPT) -> Adapters:
    """The adapters of a run over `base`; of a tuned model all its leaves."""
    if (folder / MODEL).is_dir():
        return {**leaves(load(str(folder / MODEL), dtype(base.wte.w), device=device(base)))}
    return load_adapters_in(folder / ADAPTER, base)


def load_adapters_in(folder: Path, base: GPT) -> Adapters:
    """The adapters of a folder in our format or in PEFT's, over `base`."""
    if (folder / ADAPTERS).is_file():
        return load_adapters(folder / ADAPTERS, base)
    return load_peft(folder, base)


def is_training(folder: Path) -> bool:
    """Whether a process is training in a run directory now."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
