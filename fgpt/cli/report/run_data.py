"""The files of a run directory, whether the run has finished or not."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fgpt.cli import run_dir
from fgpt.cli.evaluation.compare.results import Answer, Comparison
from fgpt.cli.metrics_log import Line, read_metrics
from fgpt.cli.paths import shareable, shareable_fields
from fgpt.cli.run_json import recipe_class, recipe_fields, upgrade
from fgpt.cli.tasks import TASKS, TaskType
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError, short_repr
from fgpt.io.files import read_json


@dataclass(frozen=True)
class RunData:
    """Everything a report shows; what does not exist is None or empty."""

    folder: Path
    run: Mapping[str, Any]
    """The fields of its recipe."""
    task: TaskType
    lines: Sequence[Line] = ()
    """The lines of metrics.jsonl, one for each step, in the order of the steps."""
    truncated_lines: int = 0
    """Incomplete lines at the end of metrics.jsonl, which are left out: 0 or 1."""
    repeated_steps: int = 0
    """Lines replaced by a later one of the same step, written by a run that resumed before it."""
    last_write: float | None = None
    """When metrics.jsonl was last written to, in seconds since 1970."""
    status: Mapping[str, Any] | None = None
    is_running: bool = False
    """Whether a process is training in the run directory now."""
    environment: Mapping[str, Any] | None = None
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    """By the stem of their file."""
    scores: Mapping[str, Any] | None = None
    """Scores of a classifier."""
    confusion: bytes | None = None
    """The confusion matrix, a PNG."""
    result: Mapping[str, Any] | None = None
    """Held-out losses of a pretraining."""
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By the stem of their file."""
    per_example: Sequence[Mapping[str, Any]] | None = None
    """The lines of per_example.jsonl."""

    @property
    def name(self) -> str:
        return str(self.run["name"])

    @property
    def directory(self) -> str:
        """The run directory as a page may name it."""
        return shareable(self.folder)

    @property
    def eval_command(self) -> str:
        """The command that evaluates the run."""
        return self.task.eval_command(shlex.quote(self.directory))


def read(folder: Path) -> RunData:
    """Raises InputError for a file that is damaged."""
    run = upgrade(_read_object(folder / run_dir.RUN))
    if not isinstance(run.get("name"), str):
        raise InputError(f"{folder / run_dir.RUN}: expected a run, which has a name")
    metrics, confusion = folder / run_dir.METRICS, folder / run_dir.CONFUSION
    lines, truncated_lines, repeated_steps = read_lines(metrics) if metrics.is_file() else ([], 0, 0)
    return RunData(
        folder=folder,
        run=shareable_fields(recipe_fields(run)),
        task=TASKS[recipe_class(folder / run_dir.RUN, run)],
        lines=lines,
        truncated_lines=truncated_lines,
        repeated_steps=repeated_steps,
        last_write=metrics.stat().st_mtime if lines else None,
        status=_read_if_exists(folder / run_dir.STATUS),
        is_running=_is_locked(folder / run_dir.LOCK),
        environment=_read_if_exists(folder / run_dir.ENVIRONMENT),
        comparisons={path.stem: read_comparison(path) for path in _result_files(folder, "compare")},
        scores=_read_if_exists(folder / run_dir.SCORES),
        confusion=confusion.read_bytes() if confusion.is_file() else None,
        result=_read_if_exists(folder / run_dir.RESULT),
        evaluations={path.stem: _read_object(path) for path in _result_files(folder, Path(run_dir.EVAL).stem)},
        per_example=_read_lines_if_exist(folder / run_dir.PER_EXAMPLE),
    )


def _result_files(folder: Path, kind: str) -> list[Path]:
    """The result files of a kind, that of the run's own settings first."""
    return sorted([*folder.glob(f"{kind}.json"), *folder.glob(f"{kind}-*.json")], key=lambda path: path.stem)


def read_lines(metrics: Path) -> tuple[list[Line], int, int]:
    """The lines in the order of their steps, the number of incomplete lines left out, and the number of lines replaced
    by a later one of the same step.

    Raises InputError for a line that is not a step's.
    """
    lines, data = read_metrics(metrics), metrics.read_bytes()
    truncated = int(bool(data) and not data.endswith(b"\n"))
    return lines, truncated, data.count(b"\n") - len(lines)


def read_comparison(path: Path) -> Comparison:
    """The comparison in a compare.json, which has everything but the tokens of the answers.

    Raises InputError for a file that is not a comparison.
    """
    content = _read_object(path)
    try:
        settings, scores, entries = content["settings"], content["scores"], content["answers"]
        _check_comparison(scores, entries)
        steps, intervals, best = (content.get(name, {}) for name in ("steps", "intervals", "best"))
        _check_intervals(steps, intervals, best)
        rows = [InstructionRow(entry["instruction"], entry["input"], entry["reference"]) for entry in entries]
        answers = {}
        for side in scores:
            answers[side] = [Answer(entry[side]["text"], (), entry[side]["finished"]) for entry in entries]
        about = _about(settings, len(rows))
        return Comparison(path.stem, about, rows, answers, scores, settings, steps, intervals, best)
    except (KeyError, TypeError, AttributeError, IndexError) as err:
        raise InputError(
            f"{path}: not a comparison of this version ({err}); write it again: fgpt compare {path.parent}"
        ) from None


def _check_comparison(scores: Any, entries: Any) -> None:
    """Raises TypeError if the sides have different scores, a score is not a number, or a part of an answer is not a
    string.
    """
    sides = list(scores.values()) if isinstance(scores, dict) else []
    if not sides or not all(isinstance(side, dict) and side.keys() == sides[0].keys() for side in sides):
        raise TypeError("expected the same scores for each side")
    for side in sides:
        for score in side.values():
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise TypeError(f"a score is {short_repr(score)}: expected a number")
    if not isinstance(entries, list):
        raise TypeError(f"its answers are {short_repr(entries)}: expected a list")
    texts = [entry[name] for entry in entries for name in ("instruction", "input", "reference")]
    texts += [entry[side]["text"] for entry in entries for side in scores]
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a prompt or an answer is {short_repr(text)}: expected a string")


def _check_intervals(steps: Any, intervals: Any, best: Any) -> None:
    """Raises TypeError if the steps, the intervals or the best sides are not what a comparison writes."""
    is_right = all(isinstance(part, dict) for part in (steps, intervals, best))
    is_right = is_right and all(type(step) is int for step in steps.values())
    is_right = is_right and all(isinstance(sides, list) for sides in best.values())
    is_right = is_right and all(isinstance(widths, dict) for widths in intervals.values())
    if not is_right or not all(type(x) in (int, float) for widths in intervals.values() for x in widths.values()):
        raise TypeError("expected steps, intervals and best sides")


def _about(settings: Mapping[str, Any], num_rows: int) -> list[str]:
    decoding = [f"{name.replace('_', '-')} {value}" for name, value in settings["sampling"].items() if value]
    if settings["sampling"]["temperature"]:
        decoding.append(f"seed {settings['seed']}")
    else:
        decoding.insert(0, "greedy")
    precision = settings["dtype"] + (f" and {settings['quantize']}" if settings["quantize"] else "")
    return [
        f"{num_rows} {settings['prompts']}; base {shareable(settings['base'])} in {precision}; "
        f"decoding, the same for all: {', '.join(decoding)}, at most {settings['max_new_tokens']} new tokens."
    ]


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock; a process that ends, however it ends, releases it."""
    if not path.is_file() or path.is_symlink():  # to lock a file is to empty it
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_if_exists(path: Path) -> dict[str, Any] | None:
    return _read_object(path) if path.is_file() else None


def _read_lines_if_exist(path: Path) -> list[dict[str, Any]] | None:
    if not path.is_file():
        return None
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: not lines of JSON ({err}); delete it") from None
    if not all(isinstance(line, dict) for line in lines):
        raise InputError(f"{path}: not lines of JSON objects; delete it")
    return lines
