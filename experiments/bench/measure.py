"""Timing two sides fairly, peak memory, and the table that comes of it."""

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fgpt.io.files import write, write_json

console = Console(highlight=False)


@dataclass(frozen=True)
class Result:
    """One line of a benchmark: a quantity on both sides, in `unit`, and how they compare."""

    what: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    """The quotient the bar is about, ours / theirs; of speeds, the median of the turns' quotients."""
    bar: str = ""
    """What the ratio should be: ">= 1.3" or "<= 0.8"; empty where it is only told."""

    @property
    def cells(self) -> tuple[str, ...]:
        met = "" if not self.bar else " (met)" if self.met else " (missed)"
        return self.what, self.unit, f"{self.ours:,.4g}", f"{self.theirs:,.4g}", f"{self.ratio:.2f}", self.bar + met

    @property
    def met(self) -> bool:
        sign, _, number = self.bar.partition(" ")
        return not self.bar or (self.ratio >= float(number) if sign == ">=" else self.ratio <= float(number))


HEADS = ("measurement", "unit", "ours", "theirs", "ours / theirs", "bar")


def interleaved(
    sides: Mapping[str, Sequence[Callable[[], object]]], device: torch.device, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of every call. At each turn every side that has a call left makes one, and each turn begins with another
    side than the last, so that a machine that slows down slows all of them. `warm` runs each side's first call before.
    """

    def timed(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    if warm:
        for calls in sides.values():
            timed(calls[0])
    names, seconds = list(sides), {name: [] for name in sides}
    for turn in range(max(map(len, sides.values()))):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn < len(sides[name]):
                seconds[name].append(timed(sides[name][turn]))
    return seconds


def quotient(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the turns' quotients."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def peak_bytes(build: Callable[[], Callable[[], object]], steps: int) -> tuple[int, int]:
    """(most bytes held during `steps` calls of what `build` returns, of that what was not held just before them).

    Resident memory of this process, so run it in a fresh one. Linux only: the kernel's high-water mark is reset after
    `build`, and memory that `build` freed is given back first, lest the steps reuse it unseen. (ru_maxrss would not
    do: a process begins with that of the one that started it.)
    """
    call = build()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(steps):
        call()
    peak = _status("VmHWM")
    return peak, peak - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def hardware(device: torch.device) -> str:
    """One line that a figure should never be without."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{cpu}, {os.cpu_count()} cores ({torch.get_num_threads()} threads){gpu}, torch {torch.__version__}"


def report(name: str, results: Sequence[Result], notes: Sequence[str], out: Path) -> None:
    """Print the table, and write it to out/NAME.json and out/NAME.md."""
    table = Table(*HEADS, title=f"{name}: fgpt and transformers + peft")
    for result in results:
        table.add_row(*result.cells)
    console.print(table, *notes, sep="\n")
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADS, ("---",) * len(HEADS), *(r.cells for r in results))]
    out.mkdir(parents=True, exist_ok=True)
    write(out / f"{name}.md", ("\n".join([*lines, "", *notes]) + "\n").encode())
    write_json(out / f"{name}.json", {"results": [asdict(r) | {"met": r.met} for r in results], "notes": list(notes)})
