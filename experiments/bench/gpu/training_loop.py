"""The loop around a training's steps: metrics read at once or a step late, rows of ragged widths or of one width, and
what `--micro-batch-size auto` chooses.
"""

import contextlib
import itertools
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fgpt
from experiments.bench.gpu.measure import DEVICE, LORA_TARGET, gpt2_medium, on
from experiments.bench.gpu.report import Report
from fgpt.adapters import adapt
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training import loop
from fgpt.cli.training.build import batches
from fgpt.cli.training.job import InitialState, TrainingJob, place
from fgpt.cli.training.micro_batch import with_largest_micro_batch
from fgpt.cli.training.row_order import RowOrder
from fgpt.data import packing
from fgpt.data.examples import Example
from fgpt.losses import nll
from fgpt.optim import adamw, constant_schedule
from fgpt.recipes import FineTuningRecipe, find
from fgpt.train_step import init_state, make_step
from fgpt.tree import astype

STEPS = 16
SECTION = "training loop"


def training_loop(report: Report, tiny: bool) -> None:
    cfg, base = gpt2_medium(tiny)
    base, order = on(astype(base, torch.bfloat16)), row_order(cfg, 8)
    devices = {"at once": frozenset[str](), "a step late": frozenset({DEVICE.type})}
    for width, pad_to in {"ragged": None, "one width": cfg.n_ctx}.items():
        for when, ahead in devices.items():
            with mock.patch.object(loop, "AHEAD_DEVICES", ahead):
                report.add(SECTION, f"8 rows, {width}, metrics {when}", times(job(base, order, pad_to)))
    if DEVICE.type == "cuda":
        report.add(SECTION, "micro-batch size auto, of 128 rows in an update", choice(base, cfg))


def row_order(cfg: fgpt.Config, rows: int) -> RowOrder:
    """Examples of 40 to 200 random tokens (fewer in a small context), the second half of each with a loss."""
    lengths = torch.randint(cfg.n_ctx // 25, cfg.n_ctx // 5, (1500,), generator=fgpt.key(0)).tolist()
    tokens = torch.randint(cfg.vocab_size, (max(lengths),), generator=fgpt.key(1)).tolist()
    recipe = find("lora-medium")
    assert isinstance(recipe, FineTuningRecipe)
    examples = [Example.completion(tuple(tokens[:length]), length // 2) for length in lengths]
    return RowOrder(examples, replace(recipe, micro_batch_size=rows, grad_accumulation_steps=1), cfg.n_ctx)


def job(base: fgpt.GPT, order: RowOrder, pad_to: int | None) -> TrainingJob:
    optimizer, rows = adamw(1e-4), len(order.first_epoch[0])
    return TrainingJob(
        recipe=replace(find("lora-medium"), checkpoint_every_minutes=99.0),
        step=make_step(lambda tuned, frozen, batch, seed: nll(adapt(frozen, tuned), batch), optimizer),
        frozen=base,
        batches=lambda begin: batches(order, rows, pad_to, begin),
        steps=STEPS,
        schedule=constant_schedule(1e-4),
        rng=fgpt.key(0),
        fingerprint={},
        initial_state=InitialState(init_state(fgpt.lora(base, fgpt.key(1), 8, 16, LORA_TARGET), optimizer)),
        tokenizer=fgpt.tokenizer("nano"),
    )


def times(training: TrainingJob) -> dict[str, Any]:
    """Of a step, without the first two, which build what later ones use; and of the slowest one."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(None):
        loop.train_loop(training, Path(out))
        seconds = [line["seconds"] for line in read_metrics(Path(out) / "metrics.jsonl")]
    each = [1e3 * (after - before) for before, after in itertools.pairwise(seconds[1:-1])]
    return {"ms": round(statistics.median(each), 1), "slowest (ms)": round(max(each), 1)}


def choice(base: fgpt.GPT, cfg: fgpt.Config) -> dict[str, Any]:
    """What is chosen, and the peak of a step of it, in which the device's memory is not exhausted."""
    order, training = row_order(cfg, 128), job(base, row_order(cfg, 8), cfg.n_ctx)
    state = training.initial_state.take()
    recipe = find("lora-medium")
    assert isinstance(recipe, FineTuningRecipe)

    def step(rows: int) -> None:
        batch = place(packing.collate(order.read(order.first_epoch[0][:rows]), cfg.n_ctx), DEVICE)
        training.step(state, base, [batch], None)

    auto = replace(recipe, micro_batch_size="auto", grad_accumulation_steps=128)
    chosen = with_largest_micro_batch(auto, DEVICE, step)
    rows = chosen.rows_per_update // chosen.grad_accumulation_steps
    torch.cuda.reset_peak_memory_stats()
    step(rows)
    torch.cuda.synchronize()
    return {"rows": rows, "peak (GB)": round(torch.cuda.max_memory_allocated() / 1e9, 1)}
