"""Training without a backward pass: forward gradients (one pass that carries a derivative) and MeZO (two passes),
beside backpropagation. Each trains a LoRA on nano's questions by `make_step`, with another `gradient=` alone.

    python -m experiments.research.forward_gradients            # --tiny: two updates

Printed are the loss on rows that no training reads, in nats per token, along the training; and the time and the peak
memory of a step above that of the model, each in a process of its own (Linux only).

Source: Baydin et al. 2022, "Gradients without Backpropagation"; Malladi et al. 2023, "Fine-Tuning Language Models with
Just Forward Passes".
"""

import argparse
import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fgpt
from experiments.research.nano_kinds import rows_by_kind, take
from fgpt.rng import fold_in
from fgpt.train_step import Gradient, State, Step
from fgpt.transforms.step_gradients import forward_gradient, zeroth_order
from fgpt.tree import tree_map

Tree = Any
KINDS = ("where", "like", "find", "what", "who")


class Method(NamedTuple):
    """A gradient of a step, and the learning rate of AdamW with it: the estimates are noisy."""

    gradient: Gradient | None
    lr: float


METHODS = {
    "backpropagation": Method(None, 3e-3),
    "forward gradient": Method(forward_gradient(), 1e-3),
    "MeZO": Method(zeroth_order(1e-3), 1e-3),
}


class Size(NamedTuple):
    """How much is trained and evaluated.

    Args:
        rank: Of the LoRAs, on queries and values.
        updates: Of AdamW.
        batch: Rows of an update.
        held_out: Rows of each kind that no training reads.
        memory_batch: Rows of the step whose memory is measured.
    """

    rank: int
    updates: int
    batch: int
    held_out: int
    memory_batch: int


FULL = Size(rank=2, updates=300, batch=8, held_out=10, memory_batch=32)
TINY = Size(rank=1, updates=2, batch=1, held_out=1, memory_batch=8)


class Rows(NamedTuple):
    train: fgpt.Batch
    test: fgpt.Batch


def read_rows(size: Size) -> Rows:
    by_kind = rows_by_kind(KINDS, 1000).values()
    test = [tree_map(lambda x: x[: size.held_out], rows) for rows in by_kind]
    train = [tree_map(lambda x: x[size.held_out :], rows) for rows in by_kind]
    return Rows(*(tree_map(lambda *xs: torch.cat(xs), *batches) for batches in (train, test)))


def tuning_loss(adapters: Tree, base: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(base, adapters), batch)


class Training(NamedTuple):
    """A step, its base, and the state before the first one."""

    step: Step
    base: fgpt.GPT
    state: State


def start(name: str, size: Size, seed: int) -> Training:
    base, (gradient, lr) = fgpt.load("nano"), METHODS[name]
    optimizer = fgpt.adamw(lr)
    adapters = fgpt.lora(base, fgpt.key(seed), size.rank, target=r".*\.(q|v)")
    return Training(
        fgpt.make_step(tuning_loss, optimizer, gradient=gradient), base, fgpt.init_state(adapters, optimizer)
    )


class Curve(NamedTuple):
    """What `train` measures.

    Args:
        losses: On the held-out rows: before, and after a third, two thirds and all of the updates.
        seconds: Of the median step.
    """

    losses: list[float]
    seconds: float


def train(name: str, size: Size, seed: int) -> Curve:
    (step, base, state), rows = start(name, size, seed), read_rows(size)
    test = take(rows.test, range(len(rows.test.tokens)))
    seconds: list[float] = []
    losses = [float(fgpt.loss(fgpt.adapt(base, state.trainable), test))]
    for t in range(size.updates):
        rng = fold_in(fgpt.key(seed), t)
        batch = take(rows.train, torch.randperm(len(rows.train.tokens), generator=rng)[: size.batch])
        begin = time.perf_counter()
        state, _ = step(state, base, [batch], rng)
        seconds.append(time.perf_counter() - begin)
        if (t + 1) * 3 // size.updates > t * 3 // size.updates:
            losses.append(float(fgpt.loss(fgpt.adapt(base, state.trainable), test)))
    return Curve(losses, statistics.median(seconds))


def peak_bytes(name: str, size: Size) -> int:
    """Of one step above what is in memory before it, in a process of its own: call it in a fresh one."""
    (step, base, state), rows = start(name, size, seed=0), read_rows(size).train
    step(state, base, [take(rows, [0])], fgpt.key(0))  # imports what torch needs for this kind of derivative
    batch = take(rows, range(size.memory_batch))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step(state, base, [batch], fgpt.key(0))
    return status("VmHWM") - before


def status(name: str) -> int:
    """A value of this process in bytes. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Curve]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="two updates, one seed")
    parser.add_argument("--seeds", type=int, default=3, help="trainings by each method")
    options = parser.parse_args(arguments)
    size, seeds = (TINY, 1) if options.tiny else (FULL, options.seeds)
    curves: dict[str, list[Curve]] = {name: [] for name in METHODS}
    for name, each in curves.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peak = process.submit(peak_bytes, name, size).result()
        print(f"{name}: a step of {size.memory_batch} rows takes {peak / 1e6:.0f} MB", flush=True)
        for seed in range(seeds):
            each.append(train(name, size, seed))
            losses = " ".join(f"{x:.3f}" for x in each[-1].losses)
            print(f"{name}, seed {seed}: {losses}; {each[-1].seconds:.3f} s a step", flush=True)
    return curves


if __name__ == "__main__":
    main()
