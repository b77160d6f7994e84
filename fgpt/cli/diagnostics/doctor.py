"""`just doctor`: the laws of `fgpt.run_checks`, asked of a run's own model, adapters and first batch on this machine."""

from dataclasses import replace

import torch
from rich.table import Table
from rich.text import Text

from fgpt.adapters import Adapters, trainable_leaves
from fgpt.checks import NUM_CHECKS, CheckResult, iter_checks
from fgpt.checks.context import slice_batch
from fgpt.cli.console import console, progress
from fgpt.cli.training import tasks
from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.recipes import AnyRecipe, PretrainingRecipe
from fgpt.tree import device, leaves, nbytes, replace_at

ROWS = 4
"""Of the first batch: enough for neighbors and ragged micro-batches, and little enough for seconds."""


def run(run: AnyRecipe) -> tuple[CheckResult, ...]:
    """Print what was found as a table.

    Raises InputError where a law does not hold, and as training does where the run cannot begin.
    """
    base, adapters, batch = assemble_job(run)
    batch = slice_batch(batch, slice(ROWS))
    console.print(machine(base, batch))
    lr = run.lr if isinstance(run, PretrainingRecipe) else run.peak_lr
    found = tuple(progress(iter_checks(base, adapters, batch, lr=lr), "checking laws", NUM_CHECKS))
    console.print(table(run.name, found))
    if broken := [x.check for x in found if x.holds is False]:
        raise InputError(f"{run.name}: {', '.join(broken)}: broken here, see the table; do not trust what this trains")
    return found


def assemble_job(run: AnyRecipe) -> tuple[GPT, Adapters, Batch]:
    """Base, adapters and the first batch of a run, as its training makes them. Pretraining trains every leaf."""
    # how fast the machine is nobody asks here
    it = tasks.build_job(
        replace(run, peak_tflops=1.0) if isinstance(run, PretrainingRecipe) and not run.peak_tflops else run
    )
    trained, batch = it.pop_initial_state().trainable, next(it.batches(0))[0]
    if it.frozen is None:
        return trained, trainable_leaves(trained), batch
    released = {path: x for path, x in leaves(it.frozen).items() if x.is_meta}  # what the adapters replace is theirs
    return replace_at(it.frozen, {path: trained[path].to(x.dtype) for path, x in released.items()}), trained, batch


def machine(base: GPT, batch: Batch) -> str:
    """What is asked, and where."""
    at = device(base)
    name = torch.cuda.get_device_name(at) if at.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    rows, seq = batch.tokens.shape
    return (
        f"torch {torch.__version__} on {at.type} ({name}), {torch.get_num_threads()} threads; "
        f"a base of {nbytes(base) / 1e6:,.0f} MB, {rows} rows of {seq} tokens"
    )


def table(name: str, found: tuple[CheckResult, ...]) -> Table:
    view = Table("law", "what was compared", "margin", "limit", "", title=f"{name}: the laws", title_justify="left")
    for column in view.columns[2:4]:
        column.justify = "right"
    for x in found:
        if x.error is None:
            view.add_row(x.check, Text(x.note, "dim"), "", "", Text("not asked", "dim"))
            continue
        count = x.tolerance == 0 and x.error == int(x.error) if x.error < float("inf") else False
        margin, limit = (f"{y:.0f}" if count else f"{y:.1e}" for y in (x.error, x.tolerance))
        said = Text("ok", "green") if x.holds else Text("FAIL", "bold red")
        compared = Text.assemble(x.compared, (f"\n{x.note}" if x.note else "", "bold red"))
        view.add_row(x.check, compared, margin, limit, said)
    return view
