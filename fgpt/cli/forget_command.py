"""`fgpt forget`: the run that a training without some rows would have made, from the last checkpoint before their use.

forget.json    in the new run: the rows, where the training was taken up, hashes of what was trained before and after
"""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fgpt.cli import run_dir, tasks
from fgpt.cli.console import console, quiet, show_progress
from fgpt.cli.environment import environment
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.paths import shareable
from fgpt.cli.run_json import write_run
from fgpt.cli.training import checkpoints
from fgpt.cli.training.forgotten_rows import MANIFEST, hashes_of_trained
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.shared_models import share_models
from fgpt.errors import InputError
from fgpt.io.files import write, write_json
from fgpt.recipes import InstructionRecipe
from fgpt.train_step import State


@dataclass(frozen=True)
class ForgetOptions:
    """Make the run that a training without some rows would have made. Only the steps from their first use on are taken
    again, if a checkpoint before it is left; the result is equal to the byte.
    """

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The name of a run, or its folder."""
    rows: str
    """A source of the rows to forget, such as a .jsonl file, as --data names one."""
    name: str | None = None
    """The name of the new run; None takes RUN-forget."""
    out: Path = Path("runs")
    """The folder of run directories."""


def run(options: ForgetOptions) -> Path:
    """Train the new run, and print what has changed. Returns its folder.

    Raises InputError for a row that the run was not trained on, and as training does.
    """
    folder = run_dir.find_finished(options.run, options.out)
    recipe = _plain_recipe(folder)
    name = options.name or f"{folder.name}-forget"
    with share_models():
        with quiet():
            before = tasks.build_job(recipe)
        task = tasks.build_task(replace(recipe, forget=options.rows, name=name, out=options.out))
    first_step = _first_difference(before, task.job)
    if first_step is None:
        raise InputError(f"{folder} ended before its {before.steps} steps came to these rows: it has nothing to forget")
    state = _last_state(folder, before, first_step)
    begin = int(state.step) if state is not None else 0
    console.print(
        f"step {first_step} is the first that reads them; taking steps {begin + 1} to {before.steps} again",
        markup=False,
    )
    manifest = {
        "run": shareable(folder),
        "rows": shareable(options.rows),
        "first_step_that_reads_them": first_step,
        "taken_up_after_step": begin,
        "steps": task.job.steps,
        "before": hashes_of_trained(folder),
    }
    out = run_dir.new_folder(options.out, name)
    with run_dir.lock_folder(out):
        write_json(out / run_dir.ENVIRONMENT, environment())
        write_json(out / run_dir.STATUS, {"state": "interrupted", "steps": task.job.steps})
        if state is not None:
            write(out / run_dir.METRICS, _lines_until(folder, begin))
            checkpoints.save(out, state, task.job.fingerprint)
        write_json(out / MANIFEST, manifest)  # the training that ends it adds the hashes after
        write_run(out, task.recipe)  # last: from here on the training can be resumed
    del before, state
    tasks.run_task(task, resumed=out)
    return out


def _plain_recipe(folder: Path) -> InstructionRecipe:
    """The recipe of a run whose examples are known. Raises InputError for any other run."""
    recipe = run_dir.instruction_run(folder)
    if type(recipe) is not InstructionRecipe:
        raise InputError(f"{folder} has learned from its own answers and not from rows: there are none to forget")
    if recipe.forget is not None:
        raise InputError(
            f"{folder} has forgotten {recipe.forget} already: forget these and the new rows together, from the run "
            "that it was made of"
        )
    return recipe


def _first_difference(before: TrainingJob, after: TrainingJob) -> int | None:
    """The first step whose micro-batches differ; None if none does."""
    updates: Iterable[tuple[list[Any], list[Any]]] = zip(before.batches(0), after.batches(0))
    with show_progress("looking for the rows", before.steps) as advance:
        for step, (old, new) in enumerate(itertools.islice(updates, before.steps), 1):
            if any(not (x.weights == y.weights).all() for x, y in zip(old, new, strict=True)):
                return step
            advance(1)
    return None


def _last_state(folder: Path, job: TrainingJob, first_step: int) -> State | None:
    """The state of the last checkpoint before a step; None to begin anew.

    A training that chooses among its states by held-out losses begins anew: of its earlier checkpoints it has kept only
    those that its later losses left.
    """
    if job.recipe.keep_best or job.recipe.early_stopping_patience is not None:
        return None
    return checkpoints.load_latest(folder, job.initial_state.peek(), job.fingerprint, first_step - 1)


def _lines_until(folder: Path, step: int) -> str:
    """The metrics of the first steps."""
    lines = [line for line in read_metrics(folder / run_dir.METRICS) if line["step"] <= step]
    return "".join(json.dumps(line) + "\n" for line in lines)
