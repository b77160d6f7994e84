"""The training loop: steps, a progress line, a metrics file, and an end that leaves something usable."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fgpt.errors import InputError
from fgpt.loss import Batch
from fgpt.optim import Schedule
from fgpt.rng import fold_in
from fgpt.train import State, Step
from fgpt.tree import device, tree_map

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Fitted:
    """How a training ended: `state` is that of the last whole step."""

    state: State
    interrupted: bool
    seconds: float
    tokens: int


def peak_memory(device: torch.device) -> float:
    """Most memory held so far, in GB: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def fit(
    step: Step,
    state: State,
    frozen: Any,
    batches: Iterable[Sequence[Batch]],
    steps: int,
    schedule: Schedule,
    rng: torch.Generator,
    metrics_file: Path,
    mfu: Callable[[float], float] | None = None,
    watch: Callable[[State], dict[str, float]] | None = None,
) -> Fitted:
    """Run `steps` updates; each takes the next list of micro-batches and a fresh key of `rng`. One JSON line a step
    goes to `metrics_file`.

    `mfu` says of a step's tokens per second which part of the machine they take. `watch` looks at the state after a
    step, and what it finds goes into that step's line; its time counts for nothing.

    Ctrl-C ends the training after the last whole step. Raises InputError where the loss is no longer a number.
    """
    at = device(state.trainable)
    began, tokens, seconds, interrupted = time.perf_counter(), 0, 0.0, False
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]}  {task.fields[memory]} GB"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with (
        open(metrics_file, "a", encoding="utf-8") as log,
        Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("training", total=steps, loss="-", speed="-", memory="-")
        try:
            for done, micro in enumerate(batches):
                micro = [tree_map(lambda x: x.to(at), b) for b in micro]
                lr = float(schedule(state.step))
                state_after, metrics = step(state, frozen, micro, fold_in(rng, done))
                loss = float(metrics.loss)
                if not math.isfinite(loss) or not math.isfinite(float(metrics.grad_norm)):
                    raise InputError(
                        f"the loss became {loss} (gradient norm {float(metrics.grad_norm)}) at step {done + 1} with lr "
                        f"{lr:.2g}: expected finite numbers; lower --lr or raise --warmup"
                    )
                new, since = sum(b.tokens.numel() for b in micro), seconds
                state, tokens, seconds = state_after, tokens + new, time.perf_counter() - began
                speed, memory = tokens / seconds, peak_memory(at)
                used = {} if mfu is None else {"mfu": round(mfu(new / (seconds - since)), 4)}
                pace = f"{speed:,.0f} tok/s" + "".join(f"  MFU {x:.1%}" for x in used.values())
                line = {
                    "step": done + 1,
                    "loss": loss,
                    "grad_norm": float(metrics.grad_norm),
                    "lr": lr,
                    "weight": float(metrics.weight),
                    "tokens": tokens,
                    "seconds": round(seconds, 3),
                    "memory_gb": round(memory, 3),
                    **used,
                }
                if watch is not None:
                    pause = time.perf_counter()
                    line |= watch(state)
                    began += time.perf_counter() - pause
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.update(task, advance=1, loss=f"{loss:.3f}", speed=pace, memory=f"{memory:.2f}")
                if not console.is_terminal and (done % max(1, steps // 20) == 0 or done + 1 == steps):
                    left = seconds / (done + 1) * (steps - done - 1)
                    now = f"step {done + 1}/{steps}  loss {loss:.3f}  {pace}"
                    console.print(f"{now}  {memory:.2f} GB  eta {left:.0f} s")
                if done + 1 == steps:
                    break
        except KeyboardInterrupt:
            interrupted = True
    return Fitted(state, interrupted, time.perf_counter() - began, tokens)


def read_metrics(metrics_file: Path) -> list[dict[str, Any]]:
    """What `fit` wrote, a dict a step."""
    return [json.loads(line) for line in metrics_file.read_text().splitlines()]


def plot_loss(metrics_file: Path, picture: Path, title: str, unit: str = "token") -> None:
    """Draw loss over steps, raw and smoothed, from a metrics file. `unit` is what has the weight 1."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics_file)
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    if not rows:
        return
    keep, smooth, total = 0.95, [], 0.0
    for i, x in enumerate(losses):
        total = keep * total + (1 - keep) * x
        smooth.append(total / (1 - keep ** (i + 1)))
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.plot(steps, losses, color="#b9c6d6", linewidth=1, label="each step")
    axes.plot(steps, smooth, color="#1f5fa8", linewidth=2, label="smoothed")
    axes.set(title=title, xlabel="step", ylabel=f"loss (nats per {unit})")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
