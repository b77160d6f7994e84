"""The training loop: steps, a progress line, metrics and checkpoints, and an end that leaves something usable."""

import contextlib
import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from fgpt.cli.console import console, exclusive_progress, training_columns
from fgpt.cli.errors import DISK_FULL
from fgpt.cli.metrics_log import read_metrics, truncate_partial_line
from fgpt.cli.run_dir import METRICS, resume_command
from fgpt.cli.signals import on_first_signal
from fgpt.cli.training import checkpoints
from fgpt.cli.training.heap import keep_freed_memory
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.trackers import tracking
from fgpt.errors import InputError
from fgpt.recipes import FineTuningRecipe, TrainingRecipe
from fgpt.train_step import State
from fgpt.tree import device, leaves


@dataclass(frozen=True)
class TrainResult:
    """How a training ended: `state` is what the run leaves, after its last whole step or the best one."""

    state: State
    interrupted: bool
    seconds: float


def peak_memory(device: torch.device) -> float:
    """Most memory held so far, in GB: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def train_loop(plan: TrainingJob, out: Path) -> TrainResult:
    """Train as planned, from the last checkpoint in the folder `out` if there is one. A JSON line a step goes to its
    metrics file, and a checkpoint of the state to its checkpoints each so many minutes, at the end, and where the
    held-out loss is the best so far.

    Ctrl-C, SIGTERM and SIGHUP end the training after the step under way, with a checkpoint.

    Raises InputError where the loss is no longer a number, a trained leaf does not move, or the disk is full.
    """
    run, first = plan.run, plan.pop_initial_state()
    state = checkpoints.resume(out, first, plan.fingerprint) or first
    del first
    keep_freed_memory()
    begin, at = int(state.step), device(state.trainable)
    truncate_partial_line(out / METRICS)
    before = {line["step"]: line for line in read_metrics(out / METRICS)}
    earlier = [line for step, line in before.items() if step <= begin]
    tokens, past = (earlier[-1].get("tokens", 0), earlier[-1].get("seconds", 0.0)) if earlier else (0, 0.0)
    least = checkpoints.least_loss(out)
    if begin:
        console.print(f"going on after step {begin} of {plan.steps}")
    began, saved, still = time.perf_counter(), time.perf_counter(), set(leaves(state.trainable))
    with (
        _disk_errors(out),
        tracking(run, out, begin) as track,
        open(out / METRICS, "a", encoding="utf-8") as log,
        graceful_interrupt() as stopped,
        _progress_line(begin, plan.steps) as show,
    ):
        seconds = past
        for done, micro in zip(range(begin + 1, plan.steps + 1), plan.batches(begin)):
            lr, old = float(plan.schedule(state.step)), state
            state, metrics = plan.train_step(old, micro)
            loss, norm = float(metrics.loss), float(metrics.grad_norm)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise InputError(
                    f"the loss became {loss} (gradient norm {norm}) at step {done} with lr {lr:.2g}: expected finite "
                    "numbers; lower --lr or raise --warmup-steps"
                )
            if still and done <= 2:
                was, now = leaves(old.trainable), leaves(state.trainable)
                still = {path for path in still if was[path].equal(now[path])}
                del was, now
            if still and done == 2:
                _raise_if_frozen(run, still, len(leaves(state.trainable)), lr)
            del old
            new, since = sum(b.tokens.numel() for b in micro), seconds
            tokens, seconds = tokens + new, past + time.perf_counter() - began
            line = {
                "step": done,
                "loss": loss,
                "grad_norm": norm,
                "lr": lr,
                "weight": float(metrics.weight),
                "tokens": tokens,
                "seconds": round(seconds, 3),
                "memory_gb": round(peak_memory(at), 3),
            }
            if plan.mfu:
                line["mfu"] = round(plan.mfu(new / (seconds - since)), 4)
            pause = time.perf_counter()
            if plan.heldout and run.eval_every and done % run.eval_every == 0:
                line["heldout_loss"] = plan.heldout(state.trainable)
                console.print(f"step {done}  held out: loss {line['heldout_loss']:.4f}")
            log.write(json.dumps(line) + "\n")
            log.flush()
            track(line)
            if done in before and any(
                before[done].get(name, line[name]) != line[name] for name in ("loss", "grad_norm")
            ):
                console.print(f"step {done} came out otherwise than before: another machine, or other versions?")
                before = {}  # once is enough
            show(line)
            better = line.get("heldout_loss", math.inf) < least
            due, ending = (
                time.perf_counter() - saved >= 60 * run.checkpoint_every_minutes,
                stopped() or done == plan.steps,
            )
            if better or due or ending:
                os.fsync(log.fileno())  # what the checkpoint goes on from is on disk before it
                checkpoints.save(out, state, plan.fingerprint, line.get("heldout_loss"))
                checkpoints.prune(out, run.keep_checkpoints)
                least, saved = min(least, line.get("heldout_loss", math.inf)), time.perf_counter()
            began += time.perf_counter() - pause  # of looking and saving, not of training
            if ending:
                break
    checkpoints.prune(out, run.keep_checkpoints)  # again, for a training that was killed in the midst of its last
    interrupted = int(state.step) < plan.steps
    if run.keep_best and not interrupted:
        if found := checkpoints.load_best(out, state, plan.fingerprint):
            state = found
            console.print(f"taking the state after step {int(state.step)}, of the least held-out loss")
        else:
            console.print("no checkpoint with a held-out loss is there: taking the last state")
    return TrainResult(state, interrupted, seconds)


@contextlib.contextmanager
def _progress_line(begin: int, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What is yielded shows a step's line: as a bar in a terminal, elsewhere as some twenty lines in all."""
    began = time.perf_counter()
    bars = Progress(*training_columns(console.width), console=console, expand=True, disable=not console.is_terminal)
    with exclusive_progress("training"), bars as bar:
        task = bar.add_task("training", total=steps, completed=begin, figures="")

        def show(line: dict[str, Any]) -> None:
            done, used = line["step"], f"  MFU {line['mfu']:.1%}" if "mfu" in line else ""
            pace = f"{line['tokens'] / max(line['seconds'], 1e-3):,.0f} tok/s{used}"
            figures = f"loss {line['loss']:.3f}  {pace}  {line['memory_gb']:.2f} GB"
            bar.update(task, advance=1, figures=figures)
            if not console.is_terminal and ((done - 1) % max(1, steps // 20) == 0 or done == steps):
                left = (time.perf_counter() - began) / (done - begin) * (steps - done)
                console.print(f"step {done}/{steps}  {figures}  eta {left:.0f} s")

        yield show


def _raise_if_frozen(run: TrainingRecipe, paths: set[str], of: int, lr: float) -> None:
    """A LoRA's A moves from the second step on, for its B begins at 0; by then all else has moved."""
    leave_out = ", or leave them out by --adapter.target" if isinstance(run, FineTuningRecipe) else ""
    raise InputError(
        f"{len(paths)} of {of} trained leaves did not move in two steps ({', '.join(sorted(paths)[:4])}): the loss "
        f"does not depend on them, or lr {lr:.2g} is below what their numbers can show; raise --lr{leave_out}"
    )


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Say how a training goes on that could not write."""
    try:
        yield
    except OSError as err:
        remedy = "free space" if err.errno in DISK_FULL else "see to it"
        raise InputError(f"cannot write to {out}: {err.strerror or err}; {remedy}, then {resume_hint(out)}") from None
    except InputError as err:
        if "free space" not in str(err):
            raise
        what = str(err).removesuffix(" or choose another folder")  # it goes on where it is
        raise InputError(f"{what}, then {resume_hint(out)}") from None


def resume_hint(out: Path) -> str:
    """The command that takes a training up."""
    return f"go on with: {resume_command(out)}"


@contextlib.contextmanager
def graceful_interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C, SIGTERM or SIGHUP has asked for an end. A second one ends at once."""
    asked = threading.Event()

    def ask() -> None:
        asked.set()
        with contextlib.suppress(RuntimeError):  # where it came in the middle of another line
            console.print("ending after this step; Ctrl-C again to end at once")

    with on_first_signal(ask):
        yield asked.is_set
