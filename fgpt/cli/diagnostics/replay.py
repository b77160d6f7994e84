"""Replay of any step of a training: its batch, loss and gradient norm, computed again from the run alone."""

from pathlib import Path
from typing import Any

from rich.table import Table

from fgpt.cli import run_dir, tasks
from fgpt.cli.console import console, result_console, show_progress
from fgpt.cli.devices import resolve_device
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training import checkpoints
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.reproducibility import differing, rounding
from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.objectives.kto import JudgedBatch
from fgpt.objectives.pairs import PairBatch
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import Metrics

SWEEP_ROUNDING = 1e-4
"""How far a step by itself may be from that of a member of a sweep, relative to loss and gradient norm."""
SHOWN = 300
"""Characters shown of a row's beginning, and of its end."""


def replay(name: str, step: int, out: Path = Path("runs")) -> None:
    """Compute step `step` of a run again, from the last checkpoint before it or from the start. Its rows are shown, and
    its loss and gradient norm beside those in the log.

    Raises InputError if there is no such run or step, and if the step differs from the log: in a bit, or where a device
    gives no equal bits, by more than rounding.
    """
    folder = run_dir.find_any(name, out)
    job = tasks.build_job(run_dir.read_run(folder))
    if not 1 <= step <= job.steps:
        raise InputError(f"step {step} of {folder}: expected one from 1 to {job.steps}")
    micro_batches, metrics = compute_step(job, folder, step)
    for row in show_rows(micro_batches, job.tokenizer):
        console.print(row, style="dim", soft_wrap=True)
    lines = {line["step"]: line for line in read_metrics(folder / run_dir.METRICS)}
    logged = lines.get(step, {})
    replayed = {name: float(getattr(metrics, name)) for name in ("loss", "grad_norm", "weight")}
    table = Table("", "replayed", "logged", title=f"{folder}, step {step} of {job.steps}", title_justify="left")
    for name, value in replayed.items():
        table.add_row(name.replace("_", " "), repr(value), repr(logged[name]) if name in logged else "not reached")
    result_console.print(table)
    tolerance = rounding(job.recipe, resolve_device(job.recipe.device))
    if tolerance:
        why = "a GPU adds in any order without --deterministic"
        console.print(f"compared up to rounding, {tolerance:g} of each value: {why}")
    if (folder.parent / run_dir.SWEEP).is_file():
        tolerance = max(tolerance, SWEEP_ROUNDING)
        console.print(f"compared up to rounding, {tolerance:g} of each value: a sweep multiplies all members at once")
    if names := differing(logged, replayed, tolerance):
        raise InputError(
            f"step {step} differs from the log ({', '.join(names)}): are the machine, the number of threads and "
            f"the versions those that {folder / run_dir.ENVIRONMENT} names?"
        )


def compute_step(job: TrainingJob, folder: Path, step: int) -> tuple[list[Any], Metrics]:
    """The micro-batches of one step, and its metrics."""
    initial = job.initial_state.take()
    state = checkpoints.load_latest(folder, initial, job.fingerprint, step - 1) or initial
    del initial
    begin = int(state.step)
    what = f"computing steps {begin + 1} to {step}" if begin + 1 < step else f"computing step {step}"
    console.print(what)
    batches = job.batches(begin)
    with show_progress(what, step - begin) as advance:
        while True:
            micro_batches = next(batches)
            state, metrics = job.train_step(state, micro_batches)
            advance(1)
            if int(state.step) == step:
                return micro_batches, metrics


def show_rows(micro_batches: list[Any], tokenizer: Tokenizer) -> list[str]:
    """The texts of each row, long ones without their middle, with a bar between its documents."""
    lines: list[str] = []
    for part, micro_batch in enumerate(micro_batches, 1):
        batch = texts_of(micro_batch)
        for row in range(len(batch.tokens)):
            text = " ".join(_decode_row(batch, row, tokenizer).split())
            if len(text) > 2 * SHOWN:
                text = f"{text[:SHOWN]} .. {text[-SHOWN:]}"
            lines.append(f"micro-batch {part}, row {row + 1}, {batch.tokens.shape[1]} tokens: {text}")
    return lines


def texts_of(micro_batch: Any) -> Batch:
    """The texts of a micro-batch: of pairs and judged answers, those with their answers."""
    return micro_batch.batch if isinstance(micro_batch, PairBatch | JudgedBatch) else micro_batch


def _decode_row(batch: Batch, row: int, tokenizer: Tokenizer) -> str:
    """The documents of a row up to its last weighted token, separated by bars."""
    tokens = batch.tokens[row].tolist()
    segments = [1] * len(tokens) if batch.segments is None else batch.segments[row].tolist()
    last = max((i for i, weight in enumerate(batch.weights[row].tolist()) if weight), default=0)
    documents: dict[int, list[int]] = {}
    for token, segment in zip(tokens[: last + 2], segments):
        documents.setdefault(segment, []).append(token)
    texts = []
    for segment in sorted({*segments} - {0}):
        texts.append(tokenizer.decode(documents.get(segment, [])))
    return " | ".join(texts)
