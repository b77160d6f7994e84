"""`fgpt doctor`: the laws of `fgpt.run_checks` on a recipe's own model, adapters and first batch, on this machine."""

import torch
from rich.table import Table
from rich.text import Text

from fgpt.adapter_types import Adapters
from fgpt.adapters import trainable_leaves
from fgpt.checks import NUM_CHECKS, CheckResult, iter_checks
from fgpt.checks.context import slice_batch
from fgpt.classification_head import num_classes
from fgpt.cli import tasks
from fgpt.cli.console import console, progress, result_console
from fgpt.cli.diagnostics.replay import texts_of
from fgpt.cli.output_options import is_json, print_json
from fgpt.cli.training import format_cost
from fgpt.cli.training.job import TrainingJob
from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.recipes import AnyRecipe, FineTuningRecipe, PretrainingRecipe
from fgpt.tree import device, leaves, nbytes, replace_at

NUM_ROWS = 4
"""Rows of the first batch: enough for neighbors and ragged micro-batches, and few enough to take seconds."""


def run(recipe: AnyRecipe) -> tuple[CheckResult, ...]:
    """Print the results as a table.

    Raises InputError if a law does not hold, and as training does if it cannot begin.
    """
    job = tasks.build_job(recipe)
    base, adapters, batch = first_step_inputs(job)
    batch = slice_batch(batch, slice(NUM_ROWS))
    machine = describe_machine(base, batch)
    console.print(machine)
    if isinstance(recipe, FineTuningRecipe) and recipe.quantize is not None and num_classes(base) is None:
        cost = format_cost.measure_cost(recipe, base, batch)
        if cost is not None:
            console.print(f"{format_cost.describe_cost(recipe.quantize, cost)}, on these rows", soft_wrap=True)
    compiles_blocks = isinstance(recipe, FineTuningRecipe) and recipe.compile
    if isinstance(recipe, PretrainingRecipe) and recipe.compile:
        console.print("the checks compute gradients uncompiled; --no-compile trains with the same programs")
    checks = iter_checks(base, adapters, batch, lr=peak_lr(job), compile=compiles_blocks)
    results = tuple(progress(checks, "running checks", NUM_CHECKS + compiles_blocks))
    result_console.print(table(recipe.name, results))
    if is_json():
        checks = [vars(result) | {"holds": result.holds} for result in results]
        print_json({"recipe": recipe.name, "machine": machine, "checks": checks})
    if broken := [result.check for result in results if result.holds is False]:
        raise InputError(
            f"{recipe.name}: {', '.join(broken)}: broken on this machine, see the table; do not trust what it trains"
        )
    return results


def first_step_inputs(job: TrainingJob) -> tuple[GPT, Adapters, Batch]:
    """Base, adapters and the texts of the first batch of a training, in which a lot may be empty. Pretraining trains
    every leaf.
    """
    trainable, batch = job.initial_state.take().trainable, texts_of(next(filter(None, job.batches(0)))[0])
    if job.frozen is None:
        return trainable, trainable_leaves(trainable), batch
    replaced = {path: x for path, x in leaves(job.frozen).items() if x.is_meta}  # leaves that the adapters hold
    return replace_at(job.frozen, {path: trainable[path].to(x.dtype) for path, x in replaced.items()}), trainable, batch


def peak_lr(job: TrainingJob) -> float:
    """The largest learning rate of a training."""
    return float(max(job.schedule(torch.tensor(step)) for step in range(job.steps)))


def describe_machine(base: GPT, batch: Batch) -> str:
    """Torch, the device, and the sizes of base and batch."""
    target = device(base)
    is_cuda = target.type == "cuda"
    name = torch.cuda.get_device_name(target) if is_cuda else torch.backends.cpu.get_cpu_capability()
    num_rows, seq = batch.tokens.shape
    return (
        f"torch {torch.__version__} on {target.type} ({name}), {torch.get_num_threads()} threads; "
        f"a base of {nbytes(base) / 1e6:,.0f} MB, {num_rows} rows of {seq} tokens"
    )


def table(name: str, results: tuple[CheckResult, ...]) -> Table:
    view = Table("check", "compared", "max error", "tolerance", "", title=f"{name}: checks", title_justify="left")
    for column in view.columns[2:4]:
        column.justify = "right"
    for result in results:
        if result.error is None:
            view.add_row(result.check, Text(result.note, "dim"), "", "", Text("not checked", "dim"))
            continue
        is_count = result.tolerance == 0 and result.error < float("inf") and result.error == int(result.error)
        margin, limit = (f"{x:.0f}" if is_count else f"{x:.1e}" for x in (result.error, result.tolerance))
        verdict = Text("ok", "green") if result.holds else Text("FAIL", "bold red")
        compared = Text.assemble(result.compared, (f"\n{result.note}" if result.note else "", "bold red"))
        view.add_row(result.check, compared, margin, limit, verdict)
    return view
