"""The sections of a report, in order: the training, its results, the evaluation, the options, the environment."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from fgpt.cli import config_diff
from fgpt.cli.evaluation.compare.html import comparison_view
from fgpt.cli.pages.formatting import table_rows
from fgpt.cli.pages.tables import Cell, Table, text_column
from fgpt.cli.paths import shareable, without_paths
from fgpt.cli.report.curves import curves, evaluation_table, key_numbers
from fgpt.cli.report.results import classification_scores, evaluations, heldout_losses, largest_gradients
from fgpt.cli.report.run_data import RunData


@dataclass(frozen=True)
class Section:
    id: str
    heading: str
    values: Mapping[str, Any]
    """What the template of the section, sections/ID.html, shows."""


class Ending(NamedTuple):
    """How a run ended: in a word, the color of that word, and in a sentence."""

    state: str
    color: str
    sentence: str


def report_sections(data: RunData) -> list[Section]:
    """All sections. One that lacks its data says so, and which command makes it.

    Raises InputError for results that are not of this version.
    """
    return [
        _training(data),
        RESULTS[data.task.report_section](data),
        Section("evaluation", "Evaluation", {"evaluations": evaluations(data)}),
        *_gradients(data),
        _config(data),
        Section("environment", "Environment", {"rows": table_rows(data.environment or {})}),
        Section("reproduce", "Reproduce", {}),
    ]


def summary(data: RunData) -> str:
    """What was trained on what, and for how many steps."""
    base, adapter = method(data)
    source = data.run.get("data") or data.run.get("train") or data.run.get("source")
    parts = [
        f"{adapter} on {base}" if base else "pretraining from random parameters",
        f"data {config_diff.as_text(source)}" if source else "",
        _steps(data),
    ]
    return ", ".join(part for part in parts if part)


def method(data: RunData) -> tuple[str, str]:
    """The base of a run, after its format if it is quantized, and what is trained of it; a pretraining has no base."""
    run, adapter = data.run, data.run.get("adapter")
    if not isinstance(adapter, Mapping):
        return "", "all parameters"
    base = f"{run['quantize']} {run['base']}" if run.get("quantize") else f"{run.get('base')}"
    kind = f"{adapter.get('kind')}"
    return base, f"{kind} r {adapter.get('rank')}" if kind in ("lora", "dora") else kind


def ending(data: RunData) -> Ending:
    """How the run ended, by status.json and the lock of its directory."""
    last = "no step has been written"
    if data.lines and data.last_write is not None:
        time = datetime.fromtimestamp(data.last_write, UTC)
        last = f"the last metrics, of step {data.lines[-1]['step']:g}, were written at {time:%Y-%m-%d %H:%M} UTC"
    status = data.status or {}
    reason = status.get("why")
    reason = without_paths(reason) if isinstance(reason, str) else "the reason is not recorded"
    finished = "The training finished"
    if data.lines and isinstance(steps := status.get("steps"), int) and data.lines[-1]["step"] < steps:
        finished += f" early, after step {data.lines[-1]['step']:g} of {steps:,}: its held-out loss no longer fell"
    endings = {
        "finished": Ending("finished", "c3", f"{finished}; {last}."),
        "interrupted": Ending("interrupted", "warn", f"The training was interrupted; {last}."),
        "failed": Ending("failed", "warn", f"The training failed: {reason}; {last}."),
        "running": Ending("running", "c1", f"The training is running; {last}."),
        "killed": Ending(
            "killed", "warn", f"The training ended without recording why, as a killed process does; {last}."
        ),
        "unknown": Ending(
            "end not recorded", "c0", f"The run directory does not record how the training ended; {last}."
        ),
    }
    state = status.get("state")
    if state == "running" and not data.is_running:
        state = "killed"
    return endings.get(state if isinstance(state, str) else "unknown", endings["unknown"])


def resume_command(data: RunData) -> str:
    """The command that continues a run from its last checkpoint; empty if there is nothing to continue."""
    if (data.status or {}).get("state") == "finished":
        return ""
    return f"fgpt train {shlex.quote(shareable(data.folder))} --resume"


def _steps(data: RunData) -> str:
    done = data.lines[-1]["step"] if data.lines else 0
    total = (data.status or {}).get("steps")
    return f"{done:,} of {total:,} steps" if isinstance(total, int) and total else f"{done:,} steps"


def _training(data: RunData) -> Section:
    notes = [ending(data).sentence]
    if data.truncated_lines:
        notes.append("The last line of metrics.jsonl is incomplete and left out.")
    if data.repeated_steps:
        notes.append(f"{data.repeated_steps:,} lines are of steps repeated after resuming: the later ones are drawn.")
    values = {
        "note": " ".join(notes),
        "numbers": key_numbers(data.lines, data.run, (data.status or {}).get("parameters")),
        "charts": curves(data.lines, data.task.loss_unit),
        "evaluations": evaluation_table(data.lines),
    }
    return Section("training", "Training", values)


def _comparisons(data: RunData) -> Section:
    views = {stem: comparison_view(comparison) for stem, comparison in data.comparisons.items()}
    return Section("comparison", "Samples and comparison", {"comparisons": views})


def _scores(data: RunData) -> Section:
    return Section("scores", "Scores", {"scores": classification_scores(data)})


def _heldout(data: RunData) -> Section:
    return Section("heldout", "Held-out text", {"losses": heldout_losses(data)})


def _pairs(data: RunData) -> Section:
    return Section("pairs", "Held-out pairs", {"rows": table_rows(data.result or {})})


def _gradients(data: RunData) -> list[Section]:
    """Of a run by --per-example alone."""
    largest = largest_gradients(data)
    if largest is None and not data.run.get("per_example"):
        return []
    return [Section("gradients", "Rows with the largest gradients", {"largest": largest})]


RESULTS = {"comparison": _comparisons, "scores": _scores, "heldout": _heldout, "pairs": _pairs}
"""The sections with the results of a training, by the names that tasks give them."""


def _config(data: RunData) -> Section:
    options = config_diff.options(data.run)
    changed = sum(option.differs for option in options)
    note = f"{changed or 'No'} option{'s differ' if changed != 1 else ' differs'} from the recipe {data.name}."
    if not any(option.in_recipe for option in options):
        note = f"This version has no recipe {data.name} to compare with."
    rows = []
    for option in options:
        texts = (option.name, option.text, option.default_text)
        rows.append([Cell(text, is_changed=option.differs) for text in texts])
    table = Table("options", [text_column(name) for name in ("option", "this run", data.name)], rows)
    return Section("config", "Options", {"note": note, "options": table})
