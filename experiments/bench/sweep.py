"""A step of N LoRAs as one stack against N steps of one LoRA each, on the CPU: time, and peak memory.

Members have adapters, rates and batches of their own over one base. Each side is a process, and the two take turns. All
positions have a loss, and no row has padding.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.bench.baselines import base_of, shape
from experiments.bench.member_steps import steps_of_members
from experiments.bench.timing import (
    Result,
    console,
    hardware,
    in_separate_processes,
    peak_bytes,
    report,
    times,
)
from fgpt.cli.sweep.pruners import halving_losers, halving_rungs
from fgpt.io.models import load
from fgpt.model import Config

CPU = torch.device("cpu")
MEMORY_ROWS, MEMORY_TOKENS = 4, 256
"""Of a member's batch where memory is measured."""


@dataclass(frozen=True)
class Sweep:
    """What a stacked step costs beside the same steps one by one, at four shapes."""

    members: int = 8
    repeats: int = 5
    """Rounds of every pair; the median of their ratios is reported, and the quartiles."""
    layers: int = 12
    """Of GPT-2 small's shape; fewer for a quick look."""
    out: Path = Path("runs/bench")


@dataclass(frozen=True)
class Case:
    """A base, the rows and tokens of a member's batch, and what the ratio should be."""

    base: Literal["nano", "gpt2-small"]
    rows: int
    tokens: int
    target: str


CASES = (
    Case("nano", 1, 32, "<= 0.5"),
    Case("nano", 4, 96, "<= 0.85"),
    Case("nano", 4, 256, "<= 0.95"),
    Case("gpt2-small", 4, 128, "<= 0.97"),
)


def sweep(bench: Sweep) -> None:
    """Run the benchmark and write runs/bench/sweep.json and sweep.md."""
    n, small = bench.members, Config(bench.layers, 12, 768, 1024, 50257, 3072)
    results: list[Result] = []
    for case in CASES:
        what = f"{n} members of {case.rows} x {case.tokens} tokens, {case.base}"
        console.print(f"{what} ..")
        config = None if case.base == "nano" else small
        sides = {
            name: partial(build_side, name == "stacked", config, n, case.rows, case.tokens, False)
            for name in ("stacked", "alone")
        }
        seconds = in_separate_processes(sides, bench.repeats)
        results.append(times(f"{what}: one step / {n} steps", seconds["stacked"], seconds["alone"], case.target))
        if case == CASES[2]:
            results += [halved_sweep(n, results[-1].ratio)]
    results += memory(n)
    report(
        "sweep",
        ("stacked", "alone"),
        results,
        [f"{hardware(CPU)}, fp32; {shape(small)}; LoRA r8 on every matrix"],
        bench.out,
    )


def halved_sweep(members: int, ratio: float) -> Result:
    """How much sooner a sweep with halving has its winner than all members one after the other: members × steps of one
    alone, over the steps that are taken, each at the ratio of a full stack.
    """
    steps, left, begin, work = 1600, members, 0, 0.0
    for rung in [*halving_rungs(members, steps, 2), steps]:
        work += left * (rung - begin) * (ratio if left > 1 else 1.0)
        left -= len(halving_losers({str(i): float(i) for i in range(left)}, 2)) if rung < steps else 0
        begin = rung
    speedup = members * steps / work
    what = f"{members} trainings / a sweep with halving, computed from the ratio above"
    return Result(what, "steps", members * steps, work, speedup, ">= 4")


def build_side(
    stacked: bool, config: Config | None, members: int, rows: int, tokens: int, remat: bool
) -> Callable[[], Any]:
    """A call that takes the step of all members, as one or one after the other."""
    base = load("nano") if config is None else base_of(config, CPU, torch.float32)
    together, alone = steps_of_members(base, members, rows, tokens, remat)
    return together if stacked else alone


def memory(members: int) -> list[Result]:
    """Peak bytes above the base: of a stacked step beside as many times a solo step's, and with rematerialization."""
    solo = _peak(False, 1, False)
    plain, remat = _peak(True, members, False), _peak(True, members, True)
    what = f"{members} members of {MEMORY_ROWS} x {MEMORY_TOKENS} tokens, nano: memory above the base"
    return [
        Result(
            f"{what} / {members} times one step's",
            "MB",
            plain / 1e6,
            members * solo / 1e6,
            plain / (members * solo),
            "<= 1",
        ),
        Result(f"{what}, with remat / without", "MB", remat / 1e6, plain / 1e6, remat / plain, "<= 0.5"),
    ]


def _megabytes(what: str, value: int, other: int, target: str) -> Result:
    return Result(what, "MB", value / 1e6, other / 1e6, value / other, target)


def _peak(stacked: bool, members: int, remat: bool) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        build = partial(build_side, stacked, None, members, MEMORY_ROWS, MEMORY_TOKENS, remat)
        return process.submit(peak_bytes, build, 3).result()[1]
