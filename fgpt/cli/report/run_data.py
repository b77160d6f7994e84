"""What lies in a run's folder, whether the run came to its end or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fgpt.cli import run_dir
from fgpt.cli.evaluation.compare.results import Answer, Comparison
from fgpt.cli.metrics_log import Line, read_metrics
from fgpt.cli.paths import shareable, shareable_fields
from fgpt.cli.run_json import recipe_fields
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError, shown
from fgpt.io.files import read_json


@dataclass(frozen=True)
class RunData:
    """Everything a report is made of; what is not there is None, or empty."""

    folder: Path
    run: Mapping[str, Any]
    lines: Sequence[Line] = ()
    """Of metrics.jsonl, one a step, in the steps' order."""
    torn: int = 0
    """Lines left out because their writing was cut short: 0 or 1."""
    again: int = 0
    """Steps that were done more than once, by a run that resumed before them."""
    written: float | None = None
    """When metrics.jsonl was last written to, in seconds since 1970."""
    status: Mapping[str, Any] | None = None
    at_work: bool = False
    """A process is training in the folder now."""
    environment: Mapping[str, Any] | None = None
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    """By the name of their file."""
    scores: Mapping[str, Any] | None = None
    """Of a run that classifies."""
    confusion: bytes | None = None
    """A picture."""
    result: Mapping[str, Any] | None = None
    """Of a pretraining, held out."""
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By the name of their file."""

    @property
    def name(self) -> str:
        return str(self.run["name"])

    @property
    def kind(self) -> str:
        """tuning, classes or pretraining."""
        return "classes" if "prompt" in self.run else "tuning" if "adapter" in self.run else "pretraining"


def read(at: Path) -> RunData:
    """Raises InputError for a file that is damaged."""
    run = _object(at / run_dir.RUN)
    if not isinstance(run.get("name"), str):
        raise InputError(f"{at / run_dir.RUN}: expected a run, which has a name")
    metrics, confusion = at / run_dir.METRICS, at / run_dir.CONFUSION
    lines, torn, again = read_lines(metrics) if metrics.is_file() else ([], 0, 0)
    return RunData(
        folder=at,
        run=shareable_fields(recipe_fields(run)),
        lines=lines,
        torn=torn,
        again=again,
        written=metrics.stat().st_mtime if lines else None,
        status=_if_there(at / run_dir.STATUS),
        at_work=_locked(at / run_dir.LOCK),
        environment=_if_there(at / run_dir.ENVIRONMENT),
        comparisons={p.stem: read_comparison(p) for p in _results(at, "compare")},
        scores=_if_there(at / run_dir.SCORES),
        confusion=confusion.read_bytes() if confusion.is_file() else None,
        result=_if_there(at / run_dir.RESULT),
        evaluations={p.stem: _object(p) for p in _results(at, Path(run_dir.EVAL).stem)},
    )


def _results(at: Path, kind: str) -> list[Path]:
    """The files of results of a kind, that of the run's own settings first."""
    return sorted([*at.glob(f"{kind}.json"), *at.glob(f"{kind}-*.json")], key=lambda p: p.stem)


def read_lines(metrics: Path) -> tuple[list[Line], int, int]:
    """The steps in their order, how many torn lines were left out, and how many a later line of their step replaced.

    Raises InputError for a line that is no step.
    """
    lines, data = read_metrics(metrics), metrics.read_bytes()
    return lines, int(not data.endswith(b"\n")) if data else 0, data.count(b"\n") - len(lines)


def read_comparison(path: Path) -> Comparison:
    """What compare.json holds, which is all but the tokens of the answers.

    Raises InputError for a file that is none.
    """
    held = _object(path)
    try:
        settings, scores, answers = held["settings"], held["scores"], held["answers"]
        _check_comparison(scores, answers)
        rows = [InstructionRow(x["instruction"], x["input"], x["reference"]) for x in answers]
        told = {side: [Answer(x[side]["text"], (), x[side]["finished"]) for x in answers] for side in scores}
        return Comparison(path.stem, _about(settings, len(rows)), rows, told, scores, settings)
    except (KeyError, TypeError, AttributeError, IndexError) as err:
        raise InputError(
            f"{path}: not a comparison of this version ({err}); write it anew: just compare {path.parent}"
        ) from None


def _check_comparison(scores: Any, answers: Any) -> None:
    """Raises TypeError for scores that are not numbers of the same names on every side, and for answers of which a part
    is no text.
    """
    sides = list(scores.values()) if isinstance(scores, dict) else []
    if not sides or not all(isinstance(side, dict) and side.keys() == sides[0].keys() for side in sides):
        raise TypeError("expected the same scores for each side")
    if odd := [x for side in sides for x in side.values() if isinstance(x, bool) or not isinstance(x, int | float)]:
        raise TypeError(f"a score is {shown(odd[0])}: expected a number")
    if not isinstance(answers, list):
        raise TypeError(f"its answers are {shown(answers)}: expected a list")
    texts = [x[name] for x in answers for name in ("instruction", "input", "reference")]
    texts += [x[side]["text"] for x in answers for side in scores]
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"a prompt or an answer is {shown(odd[0])}: expected a text")


def _about(settings: Mapping[str, Any], rows: int) -> list[str]:
    chosen = [f"{name.replace('_', '-')} {x}" for name, x in settings["sampling"].items() if x]
    how = ", ".join(
        [*chosen, f"seed {settings['seed']}"] if settings["sampling"]["temperature"] else ["greedy", *chosen]
    )
    over = f" and {settings['quantize']}" if settings["quantize"] else ""
    return [
        f"{rows} {settings['prompts']}; base {shareable(settings['base'])} in {settings['dtype']}{over}; "
        f"decoding, the same for all: {how}, at most {settings['most']} tokens."
    ]


def _locked(path: Path) -> bool:
    """Whether a process holds the lock, which ends with it, however that ends."""
    if not path.is_file() or path.is_symlink():  # to lock a file is to empty it
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def _object(path: Path) -> dict[str, Any]:
    held = read_json(path)
    if not isinstance(held, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(held).__name__}")
    return held


def _if_there(path: Path) -> dict[str, Any] | None:
    return _object(path) if path.is_file() else None
