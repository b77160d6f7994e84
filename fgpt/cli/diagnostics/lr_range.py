"""`fgpt lr-range`: a learning-rate range test of a recipe, as a table, a suggestion and a picture."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from rich.table import Table

from fgpt.cli import tasks
from fgpt.cli.console import console, result_console, show_progress
from fgpt.cli.figures import escape_mathtext, save_png
from fgpt.cli.training.job import place
from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.optim import constant_schedule
from fgpt.range_test import LRRange, has_diverged, lr_range
from fgpt.ranges import PositiveFloat, Range
from fgpt.recipes import AnyRecipe, FineTuningRecipe
from fgpt.recipes.tuning import default_warmup
from fgpt.tree import device


@dataclass(frozen=True)
class RangeOptions:
    """Train a recipe for a few steps with several learning rates at once, and suggest one. All options of the recipe
    may be given as well.
    """

    min_lr: PositiveFloat = 1e-4
    """The lowest rate."""
    max_lr: PositiveFloat = 1e-1
    """The highest rate; rates are spaced evenly on a logarithmic scale."""
    num_lrs: Annotated[int, Range(least=2, most=64)] = 7
    """The number of rates."""
    num_steps: Annotated[int, Range(least=2, most=10_000)] = 16
    """Optimizer steps of each rate, a tenth of them linear warmup."""
    picture: Path | None = None
    """A PNG file to write; None takes lr-range-NAME.png in the folder of run directories."""


def run(recipe: AnyRecipe, options: RangeOptions) -> LRRange:
    """Print the smoothed loss of each rate and the suggestion, and write the picture.

    Raises InputError for rates that do not rise, and as training does if it cannot begin.
    """
    if options.min_lr >= options.max_lr:
        raise InputError(f"--min-lr {options.min_lr:g} is not below --max-lr {options.max_lr:g}")
    recipe = replace(recipe, eval_every=None, keep_best=False, tracker=None)
    if isinstance(recipe, FineTuningRecipe):
        if recipe.privacy.epsilon is not None:
            raise InputError("a range test reads examples outside of the --privacy budget: choose the rate on others")
        recipe = replace(recipe, compile=False)  # mapped steps run uncompiled
    job = tasks.build_job(recipe)
    if job.step_for is None:
        raise InputError(f"{recipe.name} samples its batches from the policy: a range test has none that fit all rates")
    step_for, state = job.step_for, job.initial_state.take()
    target, warmup_steps = device(state.trainable), default_warmup(options.num_steps, options.num_steps)
    lowest, highest = math.log10(options.min_lr), math.log10(options.max_lr)
    lrs = torch.logspace(lowest, highest, options.num_lrs, dtype=torch.float64)
    begin, what = time.monotonic(), f"{options.num_steps} steps with each of {options.num_lrs} learning rates"
    with show_progress(what, options.num_steps) as advance:

        def batches() -> Iterator[list[Batch]]:
            for micro_batches in itertools.islice(job.batches(0), options.num_steps):
                yield [place(batch, target) for batch in micro_batches]
                advance(1)

        result = lr_range(
            lambda lr: step_for(constant_schedule(lr, warmup_steps), None),
            state,
            job.frozen,
            batches(),
            lrs=lrs,
            rng=job.rng,
        )
    result_console.print(table(recipe.name, result))
    result_console.print(advice(result))
    picture = options.picture or recipe.out / f"lr-range-{recipe.name}.png"
    plot(result, picture, recipe.name)
    console.print(f"{what} in {time.monotonic() - begin:.0f} s; {picture}", soft_wrap=True)
    return result


def table(name: str, result: LRRange) -> Table:
    view = Table("lr", "loss before", "loss after", "", title=f"{name}: learning rates", title_justify="left")
    for column in view.columns[:3]:
        column.justify = "right"
    diverged = has_diverged(result.losses, result.smoothed)
    for i, lr in enumerate(result.lrs.tolist()):
        note = "diverges" if diverged[i] else "steepest" if i == _steepest(result, diverged) else ""
        view.add_row(f"{lr:.2g}", f"{result.losses[i, 0]:.4f}", f"{result.smoothed[i, -1]:.4f}", note)
    return view


def _steepest(result: LRRange, diverged: list[bool]) -> int:
    """The rate of the lowest smoothed loss of those that do not diverge."""
    ends = [float("inf") if broken else float(x) for x, broken in zip(result.smoothed[:, -1], diverged, strict=True)]
    return ends.index(min(ends))


def advice(result: LRRange) -> str:
    """The suggestion as a sentence."""
    if result.suggestion is None:
        return f"no rate does better than the lowest, {float(result.lrs[0]):.2g}: give a lower --min-lr"
    if result.suggestion == float(result.lrs[-1]):
        return f"the highest rate, {result.suggestion:.2g}, descends most steeply: give a higher --max-lr"
    return f"suggestion: --lr {result.suggestion:.2g}; a long training often wants less"


def plot(result: LRRange, picture: Path, title: str) -> None:
    """The smoothed loss at the end over the rates, to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.semilogx(result.lrs, result.smoothed[:, -1], "o-", color="#1f5fa8", linewidth=2, label="smoothed, at the end")
    start = float(result.losses[0, 0])
    axes.axhline(start, color="#b9c6d6", linewidth=1, label="before training")
    if result.suggestion is not None:
        axes.axvline(result.suggestion, color="#c0392b", linestyle="--", label=f"suggestion {result.suggestion:.2g}")
    lowest = float(result.smoothed[:, -1].nan_to_num(start).min())
    axes.set_ylim(lowest - 0.1 * abs(start - lowest) - 0.01, start + abs(start - lowest) + 0.01)
    axes.set(title=escape_mathtext(title), xlabel="learning rate", ylabel="loss (nats)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    save_png(figure, picture, 120)
