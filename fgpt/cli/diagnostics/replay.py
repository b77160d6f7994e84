"""Any step of a training once more: its batch, its loss and its gradient, computed from the run alone."""

from pathlib import Path

from rich.table import Table

from fgpt.cli import run_dir
from fgpt.cli.console import console, show_progress
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training import checkpoints, tasks
from fgpt.cli.training.job import TrainingJob
from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import Metrics

SHOWN = 300
"""Characters shown of a row's beginning, and of its end."""


def replay(name: str, step: int, out: Path = Path("runs")) -> None:
    """Compute step `step` of a run again, from the last checkpoint before it or from the start. Its rows are shown, and
    its loss and gradient norm beside those in the log.

    Raises InputError where there is no such run or step, and where the step does not come out as it is logged.
    """
    where = run_dir.find_any(name, out)
    plan = tasks.build_job(run_dir.read_run(where))
    if not 1 <= step <= plan.steps:
        raise InputError(f"step {step} of {where}: expected one from 1 to {plan.steps}")
    micro, metrics = once_more(plan, where, step)
    for row in rows(micro, plan.tokenizer):
        console.print(row, style="dim", soft_wrap=True)
    logged = {line["step"]: line for line in read_metrics(where / run_dir.METRICS)}.get(step, {})
    now = {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm), "weight": float(metrics.weight)}
    table = Table("", "again", "logged", title=f"{where}, step {step} of {plan.steps}", title_justify="left")
    for key, x in now.items():
        table.add_row(key.replace("_", " "), repr(x), repr(logged[key]) if key in logged else "not reached")
    console.print(table)
    if odd := [key for key, x in now.items() if logged.get(key, x) != x]:
        raise InputError(
            f"step {step} came out otherwise than it is logged ({', '.join(odd)}): is it the machine, the number of "
            f"threads, and are these the versions, that {where / run_dir.ENVIRONMENT} names?"
        )


def once_more(plan: TrainingJob, where: Path, step: int) -> tuple[list[Batch], Metrics]:
    """The micro-batches of one step, and what the step reports."""
    first = plan.pop_initial_state()
    state = checkpoints.load_latest(where, first, plan.fingerprint, step - 1) or first
    del first
    begin = int(state.step)
    what = f"computing steps {begin + 1} to {step}" if begin + 1 < step else f"computing step {step}"
    console.print(what)
    stream = plan.batches(begin)
    with show_progress(what, step - begin) as advance:
        while True:
            micro = next(stream)
            state, metrics = plan.train_step(state, micro)
            advance(1)
            if int(state.step) == step:
                return micro, metrics


def rows(micro: list[Batch], tokenizer: Tokenizer) -> list[str]:
    """The texts of each row, long ones without their middle; a bar stands between the documents of one."""
    found: list[str] = []
    for part, batch in enumerate(micro, 1):
        for number, tokens in enumerate(batch.tokens.tolist(), 1):
            segments = [1] * len(tokens) if batch.segments is None else batch.segments[number - 1].tolist()
            last = max((i for i, x in enumerate(batch.weights[number - 1].tolist()) if x), default=0)
            texts = [
                tokenizer.decode([t for t, s in zip(tokens[: last + 2], segments) if s == one])
                for one in sorted({*segments} - {0})
            ]
            text = " ".join(" | ".join(texts).split())
            short = text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} .. {text[-SHOWN:]}"
            found.append(f"micro-batch {part}, row {number}, {len(tokens)} tokens: {short}")
    return found
