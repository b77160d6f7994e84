"""Where a run's figures go besides metrics.jsonl: TensorBoard always, wandb or trackio where the run says so.

runs/NAME/tensorboard/    event files: tensorboard --logdir runs
runs/NAME/track.json      the names of the run at wandb and trackio, by which a resumed run goes on there
runs/NAME/wandb/          wandb's own files: with WANDB_MODE=offline nothing is sent, until `wandb sync` does

trackio keeps its figures on this machine, in TRACKIO_DIR or where it usually does: `trackio show --project fgpt`.
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
from fgpt.cli.paths import shareable_fields
from fgpt.errors import InputError, one_line
from fgpt.io.files import read_json, write_json
from fgpt.recipes import TrainingRecipe

EVENTS, NAMES, PROJECT = "tensorboard", "track.json", "fgpt"

PATIENCE = 60
"""Seconds that wandb gets to begin, and at the end for what it has not sent: left alone it would try for hours, and the
run would not be saved."""

Line: TypeAlias = Mapping[str, float]
Calls: TypeAlias = tuple[Callable[[Line], None], Callable[[], None]]
"""What takes a line, and what comes after the last one."""


def check(run: TrainingRecipe) -> None:
    """Look, in no time, whether what the run is tracked by is installed. Raises InputError where it is not."""
    for name in filter(None, ("tensorboard", run.tracker)):
        try:
            metadata.distribution(name)  # wandb's own folders are called wandb: what can be imported proves nothing
        except metadata.PackageNotFoundError:
            raise InputError(
                f"{name} is not installed, and this run is tracked by it: {_pip()} install {name}"
            ) from None


@contextmanager
def tracking(run: TrainingRecipe, folder: Path, begin: int) -> Iterator[Callable[[Line], None]]:
    """What is yielded takes each line of metrics.jsonl, once that has it. `begin` is how many steps were done before:
    what TensorBoard has of later ones, from before a resumption, it forgets.

    A tracker that fails is given nothing more, which a line says; the training goes on. Raises InputError, before the
    first line, for a package that is missing, and where wandb has no key.
    """
    check(run)
    openers: dict[str, Callable[[], Calls]] = {"TensorBoard": lambda: _tensorboard(folder, begin)}
    if (tracker := run.tracker) is not None:
        opener = {"wandb": _wandb, "trackio": _trackio}[tracker]
        openers[tracker] = lambda: opener(run, folder, _own_name(folder, tracker))
    with ExitStack() as stack:
        sinks = []
        for name, opens in openers.items():
            sinks.append(_Sink(name, opens))
            stack.callback(sinks[-1].close)

        def write(line: Line) -> None:
            for sink in sinks:
                sink.write(line)

        yield write


class _Sink:
    """One place that lines go to. At its first failure it says so, and falls silent."""

    def __init__(self, name: str, opens: Callable[[], Calls]) -> None:
        self.name, self.calls = name, None
        with self._survived("cannot be used"):
            self.calls = opens()

    def write(self, line: Line) -> None:
        if self.calls is not None:
            with self._survived("failed"):
                self.calls[0](line)

    def close(self) -> None:
        if self.calls is not None:
            with self._survived("failed at the end"):
                self.calls[1]()

    @contextmanager
    def _survived(self, what: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as err:
            self.calls = None
            why = one_line(err) or type(err).__name__
            told = f"{self.name} {what}: {why}; training goes on, and metrics.jsonl has all figures"
            console.print(told, soft_wrap=True)


def _tensorboard(folder: Path, begin: int) -> Calls:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    writer = RecordWriter(_event_file(folder / EVENTS))

    def add(**fields: Any) -> None:
        writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def write(line: Line) -> None:
        for name, x in _figures(line).items():
            add(step=int(line["step"]), summary=Summary(value=[Summary.Value(tag=name, simple_value=x)]))
        writer.flush()  # a tenth of a millisecond, and a kill then takes nothing

    add(file_version="brain.Event:2")
    add(step=begin + 1, session_log=SessionLog(status=SessionLog.START))  # what was from this step on is forgotten
    writer.flush()
    return write, writer.close


def _event_file(folder: Path) -> IO[bytes]:
    """A new event file. Its name holds when it was begun, by which TensorBoard orders several, and a number; where its
    own writer would put the host's name and the process's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.iterdir()))
    return (folder / f"events.out.tfevents.{int(time.time()):010d}.{number:06d}").open("xb")


def _wandb(run: TrainingRecipe, folder: Path, name: str) -> Calls:
    """Raises InputError where wandb is to send what it gets and has no key."""
    import wandb  # two seconds
    from wandb.errors import UsageError

    try:
        it = wandb.init(
            project=PROJECT,
            name=folder.name,
            id=name,
            resume="allow",
            dir=folder,
            config=shareable_fields(run.to_json()),
            settings=wandb.Settings(
                console="off",  # what is printed here stays here
                init_timeout=PATIENCE,
                finish_timeout=PATIENCE,
                finish_timeout_raises=True,
            ),
        )
    except UsageError as err:
        raise InputError(f"wandb: {one_line(err)} Or keep it on this machine: WANDB_MODE=offline") from None
    it.define_metric("*", step_metric="step")  # its own count could not go back, as a resumed run does
    return lambda line: it.log(dict(line)), it.finish


def _trackio(run: TrainingRecipe, folder: Path, name: str) -> Calls:
    with _to_stderr():
        import trackio  # more than a second  # pyright: ignore[reportMissingImports]

        it = trackio.init(
            project=PROJECT, name=f"{folder.name}-{name}", resume="allow", config=shareable_fields(run.to_json()), embed=False
        )

    def finish() -> None:
        with _to_stderr():
            trackio.finish()  # and not the run's own, which would be called again at the process's end

    return lambda line: it.log(_figures(line), step=int(line["step"])), finish


def _to_stderr() -> contextlib.redirect_stdout[Any]:
    """What a tracker prints is no answer of ours."""
    return contextlib.redirect_stdout(sys.stderr)


def _figures(line: Line) -> dict[str, float]:
    return {name: x for name, x in line.items() if name != "step" and isinstance(x, int | float)}


def _own_name(folder: Path, tracker: str) -> str:
    """By which the tracker knows this folder's run, whatever other runs are called as well."""
    path = folder / NAMES
    names = read_json(path) if path.is_file() else {}
    if not isinstance(names, dict):
        raise InputError(f"{path}: expected the run's names by tracker; delete it to begin a new one there")
    if tracker not in names:
        write_json(path, names := names | {tracker: uuid.uuid4().hex[:8]})
    return str(names[tracker])


def _pip() -> str:
    """Of the environment that this runs in, as it can be typed here."""
    here, python = Path.cwd(), Path(sys.executable)
    return f"{python.relative_to(here) if python.is_relative_to(here) else python} -m pip"
