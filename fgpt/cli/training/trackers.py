"""Trackers of a run's metrics besides metrics.jsonl: TensorBoard always, wandb or trackio if the recipe names one.

runs/NAME/tensorboard/    event files: tensorboard --logdir runs
runs/NAME/track.json      the ids of the run at wandb and trackio, by which a resumed run continues there
runs/NAME/wandb/          wandb's own files: with WANDB_MODE=offline nothing is sent until `wandb sync`

trackio keeps its metrics on this machine, in TRACKIO_DIR or its default folder: `trackio show --project fgpt`.
"""

import contextlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeAlias

from fgpt.cli.console import console
from fgpt.cli.metrics_log import EVAL_LOSS, HELDOUT_LOSS
from fgpt.cli.paths import shareable_fields
from fgpt.errors import InputError, one_line
from fgpt.io.files import read_json, write_json
from fgpt.recipes import TrainingRecipe

EVENTS, IDS, PROJECT = "tensorboard", "track.json", "fgpt"

WANDB_TIMEOUT = 60
"""Seconds for wandb to start, and at the end to send the rest: by default it would try for hours, and the run would not
be saved."""

Line: TypeAlias = Mapping[str, float]
WriteAndClose: TypeAlias = tuple[Callable[[Line], None], Callable[[], None]]
"""Functions of a tracker: one that takes a line, and one to call after the last line."""


def check(recipe: TrainingRecipe) -> None:
    """Raises InputError if a tracker of the recipe is not installed. Takes no time."""
    for name in filter(None, ("tensorboard", recipe.tracker)):
        try:
            metadata.distribution(name)  # wandb's own folders are called wandb: what can be imported proves nothing
        except metadata.PackageNotFoundError:
            raise InputError(
                f"{name} is not installed, and this run uses it as a tracker: {_pip()} install {name}"
            ) from None


@contextmanager
def tracking(recipe: TrainingRecipe, folder: Path, begin: int) -> Iterator[Callable[[Line], None]]:
    """Yields a function that takes each line of metrics.jsonl after it was written there. `begin` is the step after
    which the training begins: TensorBoard discards what it has of later steps.

    A tracker that fails gets no more lines, and a message says so; the training continues. Raises InputError, before
    the first line, if a package is missing or wandb has no API key.
    """
    check(recipe)
    openers: dict[str, Callable[[], WriteAndClose]] = {"TensorBoard": lambda: _tensorboard(folder, begin)}
    if (tracker := recipe.tracker) is not None:
        opener = {"wandb": _wandb, "trackio": _trackio}[tracker]
        openers[tracker] = lambda: opener(recipe, folder, _run_id(folder, tracker))
    with ExitStack() as stack:
        sinks = []
        for name, open_tracker in openers.items():
            sinks.append(_Sink(name, open_tracker))
            stack.callback(sinks[-1].close)

        def write(line: Line) -> None:
            for sink in sinks:
                sink.write(line)

        yield write


class _Sink:
    """A tracker that is disabled, with a message, at its first failure."""

    def __init__(self, name: str, open_tracker: Callable[[], WriteAndClose]) -> None:
        self.name, self.functions = name, None
        with self._disable_on_error("cannot be used"):
            self.functions = open_tracker()

    def write(self, line: Line) -> None:
        if self.functions is not None:
            with self._disable_on_error("failed"):
                self.functions[0](line)

    def close(self) -> None:
        if self.functions is not None:
            with self._disable_on_error("failed at the end"):
                self.functions[1]()

    @contextmanager
    def _disable_on_error(self, what: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as err:
            self.functions = None
            why = one_line(err) or type(err).__name__
            message = f"{self.name} {what}: {why}; training continues, and metrics.jsonl has all metrics"
            console.print(message, soft_wrap=True)


def _tensorboard(folder: Path, begin: int) -> WriteAndClose:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    writer = RecordWriter(_event_file(folder / EVENTS))

    def add(**fields: Any) -> None:
        writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def write(line: Line) -> None:
        for name, x in _figures(line).items():
            add(step=int(line["step"]), summary=Summary(value=[Summary.Value(tag=name, simple_value=x)]))
        writer.flush()  # 0.1 ms, and a kill then loses nothing

    add(file_version="brain.Event:2")
    add(step=begin + 1, session_log=SessionLog(status=SessionLog.START))  # events from this step on are discarded
    writer.flush()
    return write, writer.close


def _event_file(folder: Path) -> IO[bytes]:
    """A new event file. Its name holds the time, by which TensorBoard orders several, and a number, instead of the
    host's name and the process id that TensorBoard's own writer would put there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.iterdir()))
    return (folder / f"events.out.tfevents.{int(time.time()):010d}.{number:06d}").open("xb")


def _wandb(recipe: TrainingRecipe, folder: Path, run_id: str) -> WriteAndClose:
    """Raises InputError if wandb is online and has no API key."""
    import wandb  # two seconds
    from wandb.errors import UsageError

    try:
        wandb_run = wandb.init(
            project=PROJECT,
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=folder,
            config=shareable_fields(recipe.to_json()),
            settings=wandb.Settings(
                console="off",  # console output is not sent
                init_timeout=WANDB_TIMEOUT,
                finish_timeout=WANDB_TIMEOUT,
                finish_timeout_raises=True,
            ),
        )
    except UsageError as err:
        raise InputError(f"wandb: {one_line(err)} Or keep it on this machine: WANDB_MODE=offline") from None
    wandb_run.define_metric("*", step_metric="step")  # its own step count cannot go back, as a resumed run does
    return lambda line: wandb_run.log({"step": line["step"]} | _figures(line)), wandb_run.finish


def _trackio(recipe: TrainingRecipe, folder: Path, run_id: str) -> WriteAndClose:
    with _to_stderr():
        import trackio  # more than a second  # pyright: ignore[reportMissingImports]

        trackio_run = trackio.init(
            project=PROJECT,
            name=f"{folder.name}-{run_id}",
            resume="allow",
            config=shareable_fields(recipe.to_json()),
            embed=False,
        )

    def finish() -> None:
        with _to_stderr():
            trackio.finish()  # not the run's own, which the process would call again at its end

    return lambda line: trackio_run.log(_figures(line), step=int(line["step"])), finish


def _to_stderr() -> contextlib.redirect_stdout[Any]:
    """A tracker's messages do not belong on stdout."""
    return contextlib.redirect_stdout(sys.stderr)


def _figures(line: Line) -> dict[str, float]:
    """The metrics of a line, named as transformers' Trainer names them, by which dashboards group them.

    >>> _figures({"step": 3, "loss": 2.0, "lr": 1e-3, "heldout_loss": 2.5, "eval_news_loss": 3.0})
    {'train/loss': 2.0, 'train/learning_rate': 0.001, 'eval/loss': 2.5, 'eval/news_loss': 3.0}
    """
    return {_tracked_name(name): x for name, x in line.items() if name != "step" and isinstance(x, int | float)}


def _tracked_name(metric: str) -> str:
    if metric == HELDOUT_LOSS:
        return "eval/loss"
    if EVAL_LOSS.fullmatch(metric):
        return metric.replace("eval_", "eval/", 1)
    return f"train/{TRACKED_NAMES.get(metric, metric)}"


TRACKED_NAMES = {"lr": "learning_rate", "weight": "num_loss_tokens"}
"""The names of metrics that a dashboard has otherwise."""


def _run_id(folder: Path, tracker: str) -> str:
    """The id of this folder's run at a tracker, unique even if other runs have the same name."""
    path = folder / IDS
    ids = read_json(path) if path.is_file() else {}
    if not isinstance(ids, dict):
        raise InputError(f"{path}: expected the run's id by tracker; delete it to begin new runs there")
    if tracker not in ids:
        write_json(path, ids := ids | {tracker: uuid.uuid4().hex[:8]})
    return str(ids[tracker])


def _pip() -> str:
    """The pip command of this Python environment, as it can be typed here."""
    here, python = Path.cwd(), Path(sys.executable)
    return f"{python.relative_to(here) if python.is_relative_to(here) else python} -m pip"
