"""The gradients of training rows at the end of a training: how noisy they are together, and which are the largest.

per_example.jsonl    a line for each row: its source and number, its loss and the norm of its gradient

They are those of the loss that was minimized, at what was trained, without dropout and NEFTune's noise. The norm of a
sum of n independent gradients grows with √n, so that a row's is divided by the root of its weight in the loss: without
that the longest rows come first, whatever is in them.
"""

import itertools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.adapters import dora_norms
from fgpt.cli.console import console, show_progress
from fgpt.cli.paths import shareable
from fgpt.cli.run_dir import PER_EXAMPLE
from fgpt.cli.training.job import TrainingJob, place
from fgpt.cli.training.preview import CLOSE, OPEN, text_with_mask
from fgpt.data.packing import collate
from fgpt.errors import InputError
from fgpt.io.files import write
from fgpt.kernels.precision import at_least_fp32
from fgpt.losses import Batch
from fgpt.recipes import SUPERVISED, FineTuningRecipe, InstructionRecipe, TrainingRecipe
from fgpt.rng import fold_in, key
from fgpt.transforms.per_example import NoiseScale, grads_in_chunks, noise_scale_of, square_norms
from fgpt.tree import device, tree_map

MAX_ROWS = 10_000
"""Rows that are looked at; of more, a sample by the recipe's seed."""
WORST = 0.01
"""The share of rows that the report shows."""


def check_per_example_options(recipe: TrainingRecipe) -> None:
    """Raises InputError for --per-example of a training whose loss is no sum over known rows, or that hides them."""
    if not isinstance(recipe, FineTuningRecipe) or not recipe.per_example:
        return
    if type(recipe) not in SUPERVISED:
        raise InputError(
            "--per-example is of instruction tuning and classification, whose losses are sums over rows: leave it out "
            f"of {recipe.kind} training"
        )
    if recipe.privacy.epsilon is not None:
        raise InputError(
            "--per-example writes what each row does to the model, which --privacy.epsilon hides: leave one of them out"
        )
    if isinstance(recipe, InstructionRecipe) and recipe.streaming:
        raise InputError("--per-example reads the rows once more, and --streaming keeps none of them: leave one out")


class RowGradients(NamedTuple):
    """What is known of the gradients of some examples."""

    indices: list[int]
    """The examples, ascending."""
    losses: Float[Tensor, " n"]
    """Of each, the mean over its weight, in nats."""
    norms: Float[Tensor, " n"]
    """Of the gradient of each summed loss, divided by the root of its weight."""
    noise: NoiseScale | None
    """Of the gradients of summed losses, as a step adds them up; None of fewer than two."""


def report_row_gradients(job: TrainingJob, trained: Adapters, out: Path) -> None:
    """Print how noisy the gradients of the training rows are, and write per_example.jsonl."""
    sample, num_rows = sample_rows(len(job.examples), job.recipe.seed), len(job.examples)
    result = row_gradients(job, trained, sample)
    worst = worst_rows(result.norms)
    write(out / PER_EXAMPLE, *[json.dumps(line) + "\n" for line in _lines(job, result, worst)])
    counts = {
        f"are beyond a sample of {len(sample):,} by the seed": num_rows - len(sample),
        "have no weight in the loss": len(sample) - len(result.indices),
        "are not finite, and not in the noise scale": int((~result.norms.isfinite()).sum()),
    }
    for reason, count in counts.items():
        if count:
            console.print(f"gradients of rows: {count:,} of {num_rows:,} {reason}", soft_wrap=True)
    console.print(describe_noise(result, examples_per_step(job)), soft_wrap=True)
    console.print(
        f"loss and gradient of each row: {out / PER_EXAMPLE}; fgpt report {shlex.quote(str(out))} shows the "
        f"{len(worst):,} largest",
        soft_wrap=True,
    )


def sample_rows(num_rows: int, seed: int) -> list[int]:
    """The indices of all rows, or of `MAX_ROWS` of them by the seed, ascending.

    >>> sample_rows(3, seed=0), len(sample_rows(MAX_ROWS + 1, seed=0))
    ([0, 1, 2], 10000)
    """
    order = torch.randperm(num_rows, generator=fold_in(key(seed), "per_example"))
    return sorted(order[:MAX_ROWS].tolist())


def row_gradients(job: TrainingJob, trained: Adapters, sample: list[int]) -> RowGradients:
    """The losses and gradients of the examples of `sample` that have a weight."""
    recipe, objective = job.recipe, job.loss
    assert isinstance(recipe, FineTuningRecipe)
    assert objective is not None
    target, constants = device(trained), (job.frozen, dora_norms(job.frozen, trained))
    rows = {i: collate([[job.examples[i]]]) for i in sample}
    indices = [i for i, row in rows.items() if row.weights.any()]
    weights = torch.tensor([float(rows[i].weights.sum()) for i in indices])
    if not indices:
        return RowGradients([], weights, weights, None)

    def loss(adapters: Adapters, row: Batch) -> Float[Tensor, ""]:
        return objective(adapters, constants, row, None)[0]

    batches = [place(rows[i], target) for i in indices]
    positions = recipe.rows_per_update // recipe.grad_accumulation_steps * recipe.max_seq_len
    losses, squares, total = torch.zeros(len(indices)), torch.zeros(len(indices)), None
    with show_progress("gradients of rows", len(indices)) as advance:
        for chunk, grads, chunk_losses in grads_in_chunks(loss, trained, batches, max_positions=positions):
            losses[chunk], squares[chunk] = chunk_losses.float().cpu(), square_norms(grads).float().cpu()
            finite = squares[chunk].isfinite().to(target)
            part = tree_map(lambda g, finite=finite: at_least_fp32(g[finite]).sum(0), grads)
            total = part if total is None else tree_map(torch.add, total, part)
            advance(len(chunk))
    finite_squares = squares[squares.isfinite()]
    noise = noise_scale_of(total, finite_squares.to(target)) if len(finite_squares) > 1 else None
    return RowGradients(indices, losses / weights, (squares / weights).sqrt(), noise)


def worst_rows(norms: Float[Tensor, " n"]) -> list[int]:
    """The positions of the largest norms, the largest first, and those that are not finite before them: `WORST` of all,
    one at least.

    >>> worst_rows(torch.tensor([1.0, torch.nan, 3.0]))
    [1]
    """
    count = min(len(norms), max(1, round(WORST * len(norms))))
    return norms.nan_to_num(torch.inf, torch.inf).argsort(descending=True, stable=True)[:count].tolist()


def examples_per_step(job: TrainingJob) -> float:
    """How many examples the first steps have read on average, up to a hundred of them: rows hold several."""
    assert job.row_indices is not None
    updates = [*itertools.islice(job.row_indices(0), min(job.steps, 100))]
    return sum(len(row) for update in updates for micro_batch in update for row in micro_batch) / len(updates)


def describe_noise(result: RowGradients, batch_size: float) -> str:
    """The noise scale in words, beside the batch size that was used.

    >>> noise = NoiseScale(torch.tensor(80.0), torch.tensor(1.0), torch.tensor(80.0))
    >>> describe_noise(RowGradients([1, 2], torch.ones(2), torch.ones(2), noise), 9.2)
    'gradient noise scale of 2 rows: 80 examples; a step has read 9.2'
    """
    title = f"gradient noise scale of {int(result.norms.isfinite().sum()):,} rows"
    if result.noise is None:
        return f"{title}: it needs two or more"
    if not result.noise.signal > 0:
        return f"{title}: more examples than these can show, as their mean is noise; a step has read {batch_size:.3g}"
    return f"{title}: {float(result.noise.scale):,.3g} examples; a step has read {batch_size:.3g}"


def _lines(job: TrainingJob, result: RowGradients, worst: list[int]) -> Iterator[dict[str, Any]]:
    """The lines of per_example.jsonl, in the order of the rows. The worst have their rank, place and text as well."""
    assert job.origin is not None
    ranks = {position: rank for rank, position in enumerate(worst, 1)}
    for position, index in enumerate(result.indices):
        origin = job.origin(index)
        values = {"loss": result.losses[position], "norm": result.norms[position]}
        line: dict[str, Any] = {"source": shareable(origin.source), "row": origin.row}
        line |= {name: float(x) if x.isfinite() else None for name, x in values.items()}
        if position in ranks:
            text = text_with_mask(job.examples[index], job.tokenizer, colored=False, short=True).plain
            label = f"{OPEN}{origin.label}{CLOSE}" if origin.label else ""
            line |= {"rank": ranks[position], "where": origin.where, "text": text + label}
        yield line
