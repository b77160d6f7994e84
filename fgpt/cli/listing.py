"""`fgpt recipes` and `fgpt runs`: what can be trained, and what was trained."""

from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from fgpt import recipes
from fgpt.cli import run_dir
from fgpt.cli.console import answers
from fgpt.cli.metrics_log import last_metrics
from fgpt.cli.output_options import is_json, print_json
from fgpt.errors import InputError
from fgpt.io.files import read_json


def print_recipes() -> None:
    """A table of the recipes of each kind, with the first line of their docstrings."""
    for kind in recipes.KINDS:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title=f"{kind}:", title_justify="left")
        for name, summary in recipes.describe(kind):
            table.add_row(Text(name, "bold"), summary)
        answers.print(table)


class RunSummary(NamedTuple):
    """A line of `fgpt runs`; None is what is not known."""

    name: str
    recipe: str | None
    step: int | None
    steps: int | None
    loss: float | None
    """Of the last step, in nats."""
    state: str
    """running, finished, interrupted, failed; killed if no process is training in it any more; or damaged."""


def summarize_run(folder: Path) -> RunSummary:
    """What status.json, run.json and the last line of metrics.jsonl say of a run; of a damaged one its name."""
    try:
        recipe = recipes.nearest(run_dir.read_run(folder))
        state = run_dir.read_state(folder) or "unknown"
        if state == "running" and not run_dir.is_training(folder):
            state = "killed"
        status = read_json(folder / run_dir.STATUS) if state != "unknown" else {}
        metrics = last_metrics(folder / run_dir.METRICS)
    except (InputError, OSError):
        return RunSummary(folder.name, None, None, None, None, "damaged")
    return RunSummary(folder.name, recipe, metrics.get("step"), status.get("steps"), metrics.get("loss"), state)


def print_runs(out: Path) -> None:
    """A table of the runs in a folder, the newest first; or JSON."""
    folders = run_dir.run_dirs(out)
    if is_json():
        runs = [{"folder": folder} | summarize_run(folder)._asdict() for folder in reversed(folders)]
        print_json({"runs": runs, "sweeps": run_dir.sweep_dirs(out)})
        return
    if sweeps := run_dir.sweep_dirs(out):
        names = ", ".join(f"{folder} ({len(run_dir.run_dirs(folder))} members)" for folder in sweeps)
        answers.print(f"sweeps, whose members --out FOLDER lists: {names}\n", soft_wrap=True)
    if not folders and sweeps:
        return
    if not folders:
        answers.print(f"no runs in {out}/; `fgpt train lora-nano` makes one")
        return
    table = Table("name", "recipe", "step", "loss", "state", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[2:4]:
        column.justify = "right"
    for folder in reversed(folders):
        run = summarize_run(folder)
        step = "" if run.step is None else f"{run.step}/{'?' if run.steps is None else run.steps}"
        table.add_row(run.name, run.recipe or "", step, "" if run.loss is None else f"{run.loss:.3f}", run.state)
    answers.print(table)
