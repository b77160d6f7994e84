"""A member of a sweep: a training with a run directory of its own, whose steps are taken together with the others'."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fgpt.cli import run_dir
from fgpt.cli.metrics_log import HELDOUT_LOSS, Line, ema, read_metrics
from fgpt.cli.paths import without_paths
from fgpt.cli.sweep.grid import Values
from fgpt.cli.tasks import Task
from fgpt.cli.training import checkpoints
from fgpt.cli.training.job import TrainingJob, parameter_counts
from fgpt.io.files import write, write_json
from fgpt.train_step import State

MemberState: TypeAlias = Literal["waiting", "training", "finished", "stopped", "failed"]


@dataclass(eq=False)
class Member:
    """A training among others. Its state of the moment is a slice of the stack that it is trained in."""

    values: Values
    task: Task
    folder: Path
    initial: State
    """Before the first step: the form of its states too."""
    state: MemberState = "waiting"
    why: str = ""
    """Why it was stopped or has failed."""
    lines: list[Line] = field(default_factory=list)
    """Those of its metrics file."""
    heldout_losses: dict[int, float] = field(default_factory=dict)
    """By the step after which it was measured."""
    _batches: tuple[int, Iterator[list[Any]]] | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def job(self) -> TrainingJob:
        return self.task.job

    @property
    def is_active(self) -> bool:
        """Whether it goes on."""
        return self.state in ("waiting", "training")

    @property
    def step(self) -> int:
        """The steps that it has taken."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def smoothed_loss(self) -> float:
        """The exponential moving average of its losses in training."""
        return ema([line["loss"] for line in self.lines])[-1] if self.lines else float("inf")

    @property
    def heldout_loss(self) -> float | None:
        """The last one that was measured."""
        return self.heldout_losses[max(self.heldout_losses)] if self.heldout_losses else None

    @property
    def score(self) -> float:
        """What members are compared by, the lower the better: the held-out loss, or without one the smoothed loss."""
        return self.smoothed_loss if self.heldout_loss is None else self.heldout_loss

    def read_lines(self) -> None:
        """Read its metrics file, which is not changed."""
        path = self.folder / run_dir.METRICS
        self.lines = list(read_metrics(path)) if path.exists() else []
        self.heldout_losses |= {line["step"]: line[HELDOUT_LOSS] for line in self.lines if HELDOUT_LOSS in line}

    def checkpoint(self, step: int | None = None) -> State:
        """Its state at its last checkpoint, or the last one up to `step`; before the first step if there is none."""
        state = checkpoints.load_latest(self.folder, self.initial, self.job.fingerprint, step)
        return self.initial if state is None else state

    def rewind(self, step: int) -> None:
        """Drop what comes after this step: its checkpoints and metrics are computed again."""
        checkpoints.delete_after(self.folder, step)
        self.read_lines()
        if self.step > step:
            self.lines = [line for line in self.lines if line["step"] <= step]
            write(self.folder / run_dir.METRICS, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.heldout_losses = {at: loss for at, loss in self.heldout_losses.items() if at <= step}
        self._batches = None

    def next_batches(self, step: int) -> list[Any]:
        """The micro-batches of the step after `step` steps."""
        if self._batches is None or self._batches[0] != step:
            self._batches = step, self.job.batches(step)
        batches = self._batches[1]
        self._batches = step + 1, batches
        return next(batches)

    def write(self, lines: list[Line]) -> None:
        """Append lines to its metrics file."""
        self.lines += lines
        with (self.folder / run_dir.METRICS).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def save_checkpoint(self, state: State) -> None:
        checkpoints.save(self.folder, state, self.job.fingerprint, self.heldout_losses.get(int(state.step)))
        checkpoints.prune(self.folder, self.job.recipe.keep_checkpoints)

    def set_state(self, state: MemberState, why: str = "") -> None:
        """Also in status.json: a stopped member is an interrupted run, which can be resumed by itself."""
        self.state, self.why = state, why
        name = {"waiting": "running", "training": "running", "stopped": "interrupted"}.get(state, state)
        parameters = parameter_counts(self.initial.trainable, self.job.frozen)
        status = {"state": name, "steps": self.job.steps, "parameters": parameters}
        write_json(self.folder / run_dir.STATUS, status | ({"why": without_paths(why)} if why else {}))

    def standing(self) -> dict[str, Any]:
        """What its files do not say."""
        return {"state": self.state, "why": self.why, "heldout_losses": [*self.heldout_losses.items()]}

    def follow(self, standing: Mapping[str, Any]) -> None:
        """Take over the standing and the files of a member that another process has trained."""
        self.state, self.why = standing["state"], standing["why"]
        self.read_lines()
        self.heldout_losses |= dict(standing["heldout_losses"])

    def to_json(self) -> Mapping[str, Any]:
        """Its entry in sweep.json."""
        return {
            "name": self.name,
            "values": dict(self.values),
            "state": self.state,
            "why": self.why,
            "steps": self.step,
            "loss": self.smoothed_loss if self.lines else None,
            "heldout_loss": self.heldout_loss,
        }
