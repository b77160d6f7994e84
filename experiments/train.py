"""Instruction tuning, from a run to an adapter in use."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from experiments import compare, folder
from experiments.fit import Fitted, console, fit, plot_loss
from experiments.runs import Run, Tuning
from experiments.scores.nano import read_tasks
from fgpt.adapters import Adapters, adapt, dora, ia3, lora, trainable, tune
from fgpt.data import finqa, packing, sources
from fgpt.data.templates import Example, Row, encode, template
from fgpt.errors import InputError
from fgpt.io import hub
from fgpt.loss import Batch, nll
from fgpt.model import GPT, fuse
from fgpt.optim import adamw, adamw8bit, cosine
from fgpt.quantize import quantize
from fgpt.rng import fold_in, key
from fgpt.train import make_step, start
from fgpt.tree import count, leaves, matches, tree_map, update

T = TypeVar("T")

NANO_TASKS, NANO_HELDOUT = hub.EMBEDDED["nano"] / "tasks.jsonl", hub.EMBEDDED["nano"] / "heldout.jsonl"


def split(run: Run) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and rows held out: the embedded data's own, or the last of a shuffle by the run's seed. FinQA's
    pages are shortened to the run's width, and how many is told.

    Raises InputError where holding out would leave nothing to train on.
    """
    if run.data == "nano":
        return list(read_tasks(NANO_TASKS)), list(read_tasks(NANO_HELDOUT))
    rows = _shortened(run, sources.rows(run.data, None if run.columns == sources.Columns() else run.columns))
    if len(rows) <= run.heldout:
        raise InputError(f"{run.data} has {len(rows)} rows, all wanted by --heldout {run.heldout}: lower it")
    return apart(rows, run.heldout, run.seed)


def apart(rows: Sequence[T], heldout: int, seed: int) -> tuple[list[T], list[T]]:
    """All rows but `heldout`, and those: the last of a shuffle by the seed, each part in the rows' own order."""
    order = torch.randperm(len(rows), generator=fold_in(key(seed), "heldout")).tolist()
    cut = len(rows) - heldout
    return [rows[i] for i in sorted(order[:cut])], [rows[i] for i in sorted(order[cut:])]


def _shortened(run: Run, rows: list[Row]) -> list[Row]:
    if not any(isinstance(row, finqa.FinQA) for row in rows):
        return rows
    cfg, tokenizer = hub.describe(run.base)
    width, look = min(run.seq, cfg.context), template(run.template)

    def length(row: Row) -> int:
        example = encode(row, look, tokenizer)
        return max(len(example.tokens), example.prompt + finqa.ROOM)

    kept, count = finqa.shorten(rows, width, length)
    if count:
        console.print(f"shortened the text of {count:,} FinQA rows to {width} tokens; their tables are whole")
    return kept


def batches(examples: list[Example], run: Tuning, width: int) -> Iterator[list[Batch]]:
    """The micro-batches of one update after the other, epoch after epoch in a fresh order, without end."""
    micro: list[Batch] = []
    for number in itertools.count():
        for rows in packing.epoch(examples, width, run.rows, fold_in(key(run.seed), f"epoch {number}")):
            micro.append(packing.collate(rows))
            if len(micro) == run.accumulate:
                yield micro
                micro = []


def steps_of(examples: list[Example], run: Tuning, width: int) -> int:
    """Updates in the run's epochs, or as many as it names."""
    one = len(packing.epoch(examples, width, run.rows, fold_in(key(run.seed), "epoch 0")))
    return run.steps or max(1, round(run.epochs * one / run.accumulate))


def base_of(run: Tuning) -> GPT:
    """The base in its dtype, quantised as it is read, on the run's device; fused where the run adapts q, k, v as one.

    Raises InputError where there is no such base or device.
    """
    device, dtype = folder.device_of(run.device), getattr(torch, run.dtype)
    if fused(run):
        params = fuse(hub.load(run.base, dtype))
        params = params if run.quantize is None else quantize(params, run.quantize)
    else:
        params = hub.load(run.base, dtype, run.quantize)
    return tree_map(lambda x: x.to(device), params)


def fused(run: Tuning) -> bool:
    """Whether the run adapts q, k and v as one, so that its base holds them so."""
    one, three = (matches(run.adapter.where, f"blocks.0.attn.{x}") for x in ("qkv", "q"))
    return one and not three


def adapters_of(run: Tuning, params: GPT) -> Adapters:
    """Raises InputError where the target matches nothing that the kind can adapt."""
    adapter, rng = run.adapter, fold_in(key(run.seed), "lora")
    if adapter.kind == "lora":
        return lora(params, rng, adapter.rank, adapter.alpha, adapter.where, dropout=adapter.dropout)
    if adapter.kind == "dora":
        return dora(params, rng, adapter.rank, adapter.alpha, adapter.where, dropout=adapter.dropout)
    if adapter.kind == "ia3":
        return ia3(params) if adapter.target is None else ia3(params, adapter.target, None)
    return tune(params, adapter.where)


def release(params: GPT, adapters: Adapters) -> GPT:
    """`params` without the storage of leaves that `adapters` replace: full tuning then holds its weights once."""
    return update(params, {path: x.to("meta") for path, x in leaves(params).items() if path in adapters})


def updated(
    run: Tuning, base: GPT, adapters: Adapters, stream: Iterator[list[Batch]], steps: int, out: Path
) -> tuple[GPT, Fitted]:
    """`steps` updates of `adapters` over `base`. Returns the base without what they replace, and how it ended."""
    schedule = cosine(run.peak, steps, run.warmup)
    adam = adamw8bit if run.optimizer == "adamw8bit" else adamw
    optimizer = adam(schedule, weight_decay=run.weight_decay)
    step = make_step(
        lambda tuned, frozen, batch, seed: nll(adapt(frozen, tuned, rng=seed), batch, remat=run.remat), optimizer
    )
    frozen, rng = release(base, adapters), fold_in(key(run.seed), "steps")
    state = start(adapters, optimizer)
    return frozen, fit(step, state, frozen, stream, steps, schedule, rng, out / folder.METRICS)


def train(run: Run) -> Path:
    """Tune, save, compare. Returns the run's folder.

    Everything that bad input can spoil is read before anything slow begins. Raises InputError.
    """
    look, _ = template(run.template), folder.device_of(run.device)
    rows, heldout = split(run)
    cfg, tokenizer = hub.describe(run.base)
    width = min(run.seq, cfg.context)
    whole = [encode(row, look, tokenizer) for row in rows]
    given = [packing.cut(example, width) for example in whole] if run.long == "cut" else whole
    examples, dropped = packing.fit(given, width, run.long != "error")
    if shorter := sum(a is not b for a, b in zip(whole, given, strict=True)):
        console.print(f"cut {shorter} answers where their rows reach {width} tokens")
    if dropped.long or dropped.empty:
        console.print(f"left out {dropped.long} rows longer than {width} tokens and {dropped.empty} without a response")
    base = base_of(run)
    adapters = adapters_of(run, base)
    steps = steps_of(examples, run, width)
    weights = sum(len(e.tokens) - e.prompt for e in examples)
    console.print(
        f"[bold]{run.name}[/]: {run.base} ({count(base):,} parameters), {trainable(adapters):,} trained; "
        f"{len(examples):,} examples, {weights:,} response tokens, {steps} steps"
    )
    out = folder.create(run)
    frozen, fitted = updated(run, base, adapters, batches(examples, run, width), steps, out)
    saved = folder.save_tuned(out, frozen, fitted.state.trainable, run.base)
    plot_loss(out / folder.METRICS, out / folder.LOSS, run.name)
    console.print(f"{int(fitted.state.step)} steps in {fitted.seconds:.0f} s; saved {saved}")
    if fitted.interrupted:
        console.print(f"interrupted: what was trained so far is usable; compare it with `just compare {out}`")
        raise KeyboardInterrupt
    if run.compare and heldout:
        compare.report(run, out, heldout)
    return out
