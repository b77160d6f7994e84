"""The metrics of each training step: a line of metrics.jsonl, and the progress that the terminal shows of it."""

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from rich.progress import Progress

from fgpt.cli.console import console, exclusive_progress, training_columns
from fgpt.cli.devices import peak_memory
from fgpt.cli.metrics_log import Line, read_metrics, truncate_partial_line
from fgpt.cli.training.pending import PendingMetrics
from fgpt.cli.training.reproducibility import differing


class MetricsLog:
    """metrics.jsonl of a training that begins after step `begin`; open it with `with`. Without a path nothing is
    written, by a process beside the one that writes.

    Tokens and seconds are totals, which go on from those of step `begin`. Seconds are those of training alone: time
    spent in `pause` does not count. A step that is taken again may differ by `tolerance` of its loss and gradient norm.
    """

    def __init__(self, path: Path | None, begin: int, tolerance: float = 0.0) -> None:
        self._path, self._tolerance = path, tolerance
        self._earlier: dict[int, Line] = {}
        if path is not None:
            truncate_partial_line(path)
            self._earlier = {line["step"]: line for line in read_metrics(path)}
        last = {}
        for step, line in self._earlier.items():
            if step <= begin:
                last = line
        self._tokens: int = last.get("tokens", 0)
        self.seconds: float = last.get("seconds", 0.0)

    def __enter__(self) -> "MetricsLog":
        self._file: IO[str] = io.StringIO() if self._path is None else self._path.open("a", encoding="utf-8")
        self._resumed_at = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def measure(
        self,
        pending: PendingMetrics,
        *,
        device: torch.device,
        mfu: Callable[[float], float] | None = None,
    ) -> Line:
        """The line of the first step that has no line yet, when the device has computed it. `mfu` is the model FLOPs
        utilization at N tokens per second.

        Raises InputError if its loss is not finite.
        """
        line = pending.read()
        now = time.perf_counter()
        seconds = now - self._resumed_at
        self._tokens, self.seconds, self._resumed_at = self._tokens + pending.tokens, self.seconds + seconds, now
        line |= {
            "tokens": self._tokens,
            "seconds": round(self.seconds, 3),
            "memory_gb": round(peak_memory(device) / 1e9, 3),
        }
        if mfu is not None:
            line["mfu"] = round(mfu(pending.tokens / seconds), 4)
        return line

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent here is not training time."""
        start = time.perf_counter()
        yield
        self._resumed_at += time.perf_counter() - start

    def write(self, line: Line) -> None:
        """Append the line. If an earlier process took this step with another result, say so once."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        earlier = self._earlier.get(line["step"])
        computed = {name: line[name] for name in ("loss", "grad_norm")}
        if earlier and differing(earlier, computed, self._tolerance):
            beyond = f" by more than rounding, {self._tolerance:g}" if self._tolerance else ""
            console.print(
                f"step {line['step']} differs from its first computation{beyond}: another machine or other versions?"
            )
            self._earlier = {}

    def earlier_values(self, metric: str, last_step: int) -> list[float]:
        """The values of a metric that earlier processes wrote, up to a step."""
        lines = [line for step, line in sorted(self._earlier.items()) if step <= last_step]
        return [line[metric] for line in lines if metric in line]

    def sync(self) -> None:
        """Make sure that all lines are on disk."""
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def progress_line(begin: int, steps: int) -> Iterator[Callable[[Line], None]]:
    """Yields a function that shows a step's line: as a bar in a terminal, elsewhere as about twenty lines in all."""
    start = time.perf_counter()
    every = max(1, steps // 20)
    bars = Progress(*training_columns(console.width), console=console, expand=True, disable=not console.is_terminal)
    with exclusive_progress("training"), bars as bar:
        task = bar.add_task("training", total=steps, completed=begin, figures="")

        def show(line: dict[str, Any]) -> None:
            step, figures = line["step"], _figures(line)
            bar.update(task, advance=1, figures=figures)
            if not console.is_terminal and ((step - 1) % every == 0 or step == steps):
                left = (time.perf_counter() - start) / (step - begin) * (steps - step)
                console.print(f"step {step}/{steps}  {figures}  eta {left:.0f} s")

        yield show


def _figures(line: Line) -> str:
    speed = f"{line['tokens'] / max(line['seconds'], 1e-3):,.0f} tok/s"
    mfu = f"  MFU {line['mfu']:.1%}" if "mfu" in line else ""
    reward = f"reward {line['reward']:.3f}  KL {line['kl']:.3f}  " if "reward" in line else ""
    epoch = f"epoch {line['epoch']:.2f}  " if "epoch" in line else ""
    return f"{reward}loss {line['loss']:.3f}  {epoch}{speed}{mfu}  {line['memory_gb']:.2f} GB"
