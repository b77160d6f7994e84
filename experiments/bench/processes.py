"""Tokens per second of one training on several processes of one thread each, beside one process of one thread.

    python -m experiments.bench processes --counts 2

Rounds alternate the counts, each as torchrun runs it; the first step of a training is left out.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.bench.timing import Result, console, hardware, quartiles, ratios_of, report
from fgpt.errors import InputError

TARGETS = {2: ">= 1.6"}


@dataclass(frozen=True)
class Processes:
    """A training on several processes beside one."""

    recipe: str = "lora-nano"
    counts: tuple[int, ...] = (2,)
    """How many processes."""
    rows: int = 8
    """In a micro-batch, of which each process has one in an update."""
    steps: int = 30
    rounds: int = 5
    out: Path = Path("runs/bench")


def processes(bench: Processes) -> None:
    """Run the benchmark and write runs/bench/processes.json and processes.md. Raises InputError."""
    results: list[Result] = []
    for count in bench.counts:
        several: list[float] = []
        alone: list[float] = []
        for i in range(bench.rounds):
            console.print(f"{count} processes, round {i + 1} of {bench.rounds} ..")
            several.append(_tokens_per_second(bench, count, count))
            alone.append(_tokens_per_second(bench, 1, count))
        ratios = ratios_of(several, alone)
        medians = statistics.median(several), statistics.median(alone)
        what, target = f"{bench.recipe}, {count} processes", TARGETS.get(count, "")
        results.append(Result(what, "tokens/s", *medians, statistics.median(ratios), target, quartiles(ratios)))
    notes = [f"{hardware(torch.device('cpu'))}; micro-batches of {bench.rows} rows, {bench.steps} steps"]
    report("processes", ("several", "one"), results, notes, bench.out)


def _tokens_per_second(bench: Processes, num_processes: int, micro_batches: int) -> float:
    """Of a training whose updates have so many micro-batches."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        size = ["--micro-batch-size", str(bench.rows), "--grad-accumulation-steps", str(micro_batches)]
        length = ["--steps", str(bench.steps), "--compare-prompts", "0", "--out", folder]
        command = [*launcher, str(num_processes), "-m", "fgpt", "train", bench.recipe, *size, *length]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"the training ended with {done.returncode}: {done.stderr.strip().splitlines()[0]}")
        (path,) = Path(folder).glob("*/metrics.jsonl")
        first, *_, last = [json.loads(line) for line in path.read_text().splitlines()]
    return (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
