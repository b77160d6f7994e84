"""Fair timing of two sides, peak memory, and the table of results."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fgpt.cli.training.heap import keep_freed_memory
from fgpt.io.files import write, write_json
from fgpt.tree import leaves

console = Console(highlight=False)


@dataclass(frozen=True)
class Result:
    """One line of a benchmark: a quantity on two sides, in `unit`, and how they compare."""

    what: str
    unit: str
    value: float
    other: float
    ratio: float
    """value / other; for times and speeds, the median of the ratios of the rounds."""
    target: str = ""
    """What the ratio should be: ">= 1.3" or "<= 0.8"; empty if there is no target."""
    spread: tuple[float, float] | None = None
    """Lower and upper quartile of the ratios of the rounds; of several processes the lowest and highest ratio."""

    @property
    def cells(self) -> tuple[str, ...]:
        met = "" if not self.target else " (met)" if self.met else " (missed)"
        spread = "" if self.spread is None else f"{self.spread[0]:.2f} .. {self.spread[1]:.2f}"
        numbers = f"{self.value:,.4g}", f"{self.other:,.4g}", f"{self.ratio:.2f}"
        return self.what, self.unit, *numbers, spread, self.target + met

    @property
    def met(self) -> bool:
        sign, _, number = self.target.partition(" ")
        return not self.target or (self.ratio >= float(number) if sign == ">=" else self.ratio <= float(number))


def times(what: str, value: Sequence[float], other: Sequence[float], target: str = "") -> Result:
    """Times of a call, from the seconds of each round on either side."""
    ratios = ratios_of(value, other)
    medians = 1e3 * statistics.median(value), 1e3 * statistics.median(other)
    return Result(what, "ms", *medians, statistics.median(ratios), target, quartiles(ratios))


def speeds(what: str, tokens: int, value: Sequence[float], other: Sequence[float], target: str = "") -> Result:
    """Tokens per second, from the tokens of a round and its seconds on either side."""
    ratios = ratios_of(other, value)
    medians = tokens / statistics.median(value), tokens / statistics.median(other)
    return Result(what, "tokens/s", *medians, statistics.median(ratios), target, quartiles(ratios))


def ratios_of(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def quartiles(xs: Sequence[float]) -> tuple[float, float] | None:
    """Lower and upper; None for fewer than two."""
    if len(xs) < 2:
        return None
    low, _, high = statistics.quantiles(xs, n=4, method="inclusive")
    return low, high


def time_interleaved(
    sides: Mapping[str, Sequence[Callable[[], object]]], device: torch.device, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of every call. In each round every side that has a call left makes one, and each round begins with
    another side than the last, so that a machine that slows down slows all of them. `warm` runs each
    side's first call before.
    """

    def time_call(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    if warm:
        for calls in sides.values():
            time_call(calls[0])
    names, seconds = list(sides), {name: [] for name in sides}
    for round_index in range(max(map(len, sides.values()))):
        for name in names[round_index % len(names) :] + names[: round_index % len(names)]:
            if round_index < len(sides[name]):
                seconds[name].append(time_call(sides[name][round_index]))
    return seconds


def in_fresh_processes(count: int, measure: Callable[..., list[Result]], *args: Any) -> list[Result]:
    """`measure(*args)` in `count` processes, one after the other: of each result the medians, and its ratio's range.

    Rounds within a process share what was dealt to it, above all where its memory lies: their quartiles say nothing of
    the next run, and one lucky process makes a headline that does not repeat.
    """
    runs: list[list[Result]] = []
    for number in range(1, count + 1):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            runs.append(process.submit(_measure, measure, args).result())
        ratios = ", ".join(f"{result.ratio:.2f}" for result in runs[-1])
        console.print(f"process {number} of {count}: {ratios}", soft_wrap=True)
    combined: list[Result] = []
    for results in zip(*runs, strict=True):
        value, other, ratio = (
            statistics.median(getattr(x, name) for x in results) for name in ("value", "other", "ratio")
        )
        spread = (min(x.ratio for x in results), max(x.ratio for x in results))
        combined.append(replace(results[0], value=value, other=other, ratio=ratio, spread=spread))
    return combined


def _measure(measure: Callable[..., list[Result]], args: tuple[Any, ...]) -> list[Result]:
    keep_freed_memory()  # as a training does
    return measure(*args)


_side: Callable[[], object]
"""What a process of `in_separate_processes` times."""


def _build(build: Callable[[], Callable[[], object]]) -> None:
    global _side
    keep_freed_memory()
    _side = build()


def _call() -> None:
    _side()


def in_separate_processes(
    sides: Mapping[str, Callable[[], Callable[[], object]]], repeats: int
) -> dict[str, list[float]]:
    """`time_interleaved` on the CPU, each side built in a separate process, which keeps freed memory as a training
    does: in one process a side would profit from, or pay for, the pages that another has touched or freed.
    """
    with contextlib.ExitStack() as stack:
        spawn, calls = multiprocessing.get_context("spawn"), {}
        for name, build in sides.items():
            process = stack.enter_context(ProcessPoolExecutor(1, spawn))
            process.submit(_build, build).result()
            calls[name] = [lambda process=process: process.submit(_call).result()] * repeats
        return time_interleaved(calls, torch.device("cpu"))


def peak_bytes(build: Callable[[], Callable[[], object]], steps: int) -> tuple[int, int]:
    """(peak bytes during `steps` calls of what `build` returns, the same less the bytes just before them).

    Resident memory of this process, so run it in a fresh one. Linux only: the kernel's high-water mark is reset after
    `build`, and memory that `build` freed is released first, so that the steps do not reuse it unseen. (ru_maxrss does
    not work: a process starts with that of its parent.)
    """
    call = build()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(steps):
        call()
    peak = status("VmHWM")
    return peak, peak - before


def status(name: str) -> int:
    """A value of this process in /proc/self/status, in bytes. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def saved_bytes(forward: Callable[[], object], existing: Any) -> int:
    """Bytes that `forward` saves for its backward: storage shared by several tensors counts once, and that of the
    leaves of `existing` (parameters, inputs) not at all.
    """
    known = {x.untyped_storage().data_ptr() for x in leaves(existing).values()}
    saved: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used twice

    def save(x: Tensor) -> Tensor:
        saved.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        forward()
    return sum(x.untyped_storage().nbytes() for place, x in saved.items() if place not in known)


def hardware(device: torch.device) -> str:
    """The hardware and the torch version, in one line for every table."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{cpu}, {os.cpu_count()} cores ({torch.get_num_threads()} threads){gpu}, torch {torch.__version__}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns, to be read in a terminal too."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (heads, *rows)]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


def report(
    name: str,
    sides: tuple[str, str],
    results: Sequence[Result],
    notes: Sequence[str],
    out: Path,
    more: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = (),
) -> None:
    """Print the results of two `sides` as a table, then tables of (heads, rows) that have no two sides; and write them
    to out/NAME.json and out/NAME.md.
    """
    heads = ("measurement", "unit", *sides, f"{sides[0]} / {sides[1]}", "spread", "target")
    sheets = [(heads, [result.cells for result in results])] if results else []
    text = "\n\n".join([*(markdown(*sheet) for sheet in (*sheets, *more)), "\n".join(notes)])
    console.print(text, markup=False, soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    write(out / f"{name}.md", f"{text}\n".encode())
    content: dict[str, Any] = {"sides": list(sides), "results": [asdict(r) | {"met": r.met} for r in results]}
    content["more"] = [[dict(zip(heads, row, strict=True)) for row in rows] for heads, rows in more]
    write_json(out / f"{name}.json", content | {"notes": list(notes)})
