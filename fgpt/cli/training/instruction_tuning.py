"""Instruction tuning, from a run to an adapter in use."""

import itertools
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from fgpt.adapters import Adapters, adapt, dora, ia3, lora, num_trainable, trainable_leaves
from fgpt.classification_head import num_classes
from fgpt.cli import run_dir
from fgpt.cli.console import announce, console, progress, working
from fgpt.cli.evaluation import compare
from fgpt.cli.evaluation.metrics.nano import read_tasks
from fgpt.cli.evaluation.metrics.text import nats
from fgpt.cli.metrics_log import plot_loss
from fgpt.cli.training.job import TrainingJob, fingerprint
from fgpt.cli.training.loop import TrainResult, resume_hint, train_loop
from fgpt.data import conversations, finqa, instruction_datasets, packing
from fgpt.data.prompt_templates import Example, InstructionRow, Turn, encode, template
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.losses import Batch, nll
from fgpt.model import GPT, fuse_qkv
from fgpt.optim import adamw, adamw8bit, cosine_schedule
from fgpt.quantization import quantize
from fgpt.recipes import FineTuningRecipe, InstructionRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import init_state, make_step
from fgpt.tree import leaves, matches, replace_at, tree_map
from fgpt.weights import parameters

T = TypeVar("T")

NANO_TASKS, NANO_HELDOUT = models.EMBEDDED["nano"] / "tasks.jsonl", models.EMBEDDED["nano"] / "heldout.jsonl"


def split(run: InstructionRecipe) -> tuple[list[InstructionRow], list[InstructionRow]]:
    """Rows to train on, and rows held out: the embedded data's own, or the last of a shuffle by the run's seed. What of
    conversations is not trained on is counted and printed, as is how many of FinQA's pages were shortened to the run's
    width.

    Raises InputError where holding out would leave nothing to train on.
    """
    if run.data == "nano":
        return list(read_tasks(NANO_TASKS)), list(read_tasks(NANO_HELDOUT))
    given = instruction_datasets.load_examples(
        run.data, None if run.columns == instruction_datasets.Columns() else run.columns
    )
    if reasons := conversations.summary(given.left_out):
        console.print(f"of conversations, no examples of their own: {reasons}", markup=False)
    rows = _shortened(run, given.rows)
    return train_heldout_split(rows, held_out_of(rows, run.num_heldout, run.data), run.seed)


def held_out_of(rows: Sequence[object], wanted: int, source: str) -> int:
    """How many rows to hold out: as many as are wanted, or of so few that they would take more than half, a tenth.

    Raises InputError where a single row is there to be shared.
    """
    if 2 * wanted <= len(rows):
        return wanted
    if len(rows) < 2:
        raise InputError(f"{source} has {len(rows)} rows: expected 2 or more, one of them to be held out; add some")
    count = max(1, len(rows) // 10)
    console.print(
        f"held out {count:,} of {len(rows):,} rows, a tenth: --num-heldout {wanted} would be more than half",
        markup=False,
    )
    return count


def train_heldout_split(rows: Sequence[T], heldout: int, seed: int) -> tuple[list[T], list[T]]:
    """All rows but `heldout`, and those: the last of a shuffle by the seed, each part in the rows' own order.

    A conversation is not torn apart: the turns of one are all in the first part, or all in the second. So the second
    may be a few rows longer than asked for, or, where that would leave none in the first, shorter.

    Raises InputError where some are to be held out of a single conversation.
    """
    groups: dict[object, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row.conversation if isinstance(row, Turn) else i].append(i)
    order = torch.randperm(len(groups), generator=fold_in(key(seed), "heldout")).tolist()
    if heldout and len(groups) < 2:
        raise InputError(
            f"all {len(rows)} rows are of one conversation: expected 2 or more, one of them to be held out"
        )
    indices, second = list(groups.values()), set[int]()
    for group in reversed(order[1:]):
        if len(second) >= heldout:
            break
        second.update(indices[group])
    first = [row for i, row in enumerate(rows) if i not in second]
    return first, [rows[i] for i in sorted(second)]


def _shortened(run: InstructionRecipe, rows: list[InstructionRow]) -> list[InstructionRow]:
    if not any(isinstance(row, finqa.FinQA) for row in rows):
        return rows
    cfg, tokenizer = models.load_config_and_tokenizer(run.base)
    width, look = min(run.max_seq_len, cfg.n_ctx), template(run.template)

    def length(row: InstructionRow) -> int:
        example = encode(row, look, tokenizer)
        return max(len(example.tokens), example.prompt_length + finqa.ROOM)

    kept, count = finqa.shorten(rows, width, length)
    if count:
        console.print(f"shortened the text of {count:,} FinQA rows to {width} tokens; their tables are whole")
    return kept


def batches(examples: list[Example], run: FineTuningRecipe, width: int, begin: int = 0) -> Iterator[list[Batch]]:
    """The micro-batches of one update after the other, epoch after epoch in a fresh order, without end; from update
    `begin` on.
    """
    micro: list[Batch] = []
    skip = begin * run.grad_accumulation_steps
    for number in itertools.count():
        laid = packing.epoch_batches(examples, width, run.micro_batch_size, fold_in(key(run.seed), f"epoch {number}"))
        for rows in laid[skip:]:
            micro.append(packing.collate(rows))
            if len(micro) == run.grad_accumulation_steps:
                yield micro
                micro = []
        skip = max(0, skip - len(laid))


def num_steps(examples: list[Example], run: FineTuningRecipe, width: int) -> int:
    """Updates in the run's epochs, or as many as it names."""
    one = len(packing.epoch_batches(examples, width, run.micro_batch_size, fold_in(key(run.seed), "epoch 0")))
    return run.steps or max(1, round(run.epochs * one / run.grad_accumulation_steps))


def load_base(run: FineTuningRecipe) -> GPT:
    """The base in its dtype, quantized as it is read, on the run's device; fused where the run adapts q, k, v as one.

    Raises InputError where there is no such base or device, or the base is a classifier.
    """
    device, dtype = run_dir.device_of(run.device), getattr(torch, run.dtype)
    with working(f"loading {run.base}"):
        if adapts_fused_qkv(run):
            params = fuse_qkv(models.load(run.base, dtype))
            params = params if run.quantize is None else quantize(params, run.quantize)
        else:
            params = models.load(run.base, dtype, run.quantize)
        if (classes := num_classes(params)) is not None:
            raise InputError(f"{run.base} is a classifier of {classes} classes: expected a model of a head of tokens")
        return tree_map(lambda x: x.to(device), params)


def adapts_fused_qkv(run: FineTuningRecipe) -> bool:
    """Whether the run adapts q, k and v as one, so that its base holds them so."""
    one, three = (matches(run.adapter.target_pattern, f"blocks.0.attn.{x}") for x in ("qkv", "q"))
    return one and not three


def build_adapters(run: FineTuningRecipe, params: GPT) -> Adapters:
    """Raises InputError where the target matches nothing that the kind can adapt."""
    adapter, rng = run.adapter, fold_in(key(run.seed), "lora")
    if adapter.kind == "lora":
        return lora(params, rng, adapter.rank, adapter.alpha, adapter.target_pattern, dropout=adapter.dropout)
    if adapter.kind == "dora":
        return dora(params, rng, adapter.rank, adapter.alpha, adapter.target_pattern, dropout=adapter.dropout)
    if adapter.kind == "ia3":
        return ia3(params) if adapter.target is None else ia3(params, adapter.target, None)
    return trainable_leaves(params, adapter.target_pattern)


def drop_replaced_leaves(params: GPT, adapters: Adapters) -> GPT:
    """`params` without the storage of leaves that `adapters` replace: full tuning then holds its weights once."""
    return replace_at(params, {path: x.to("meta") for path, x in leaves(params).items() if path in adapters})


def assemble_job(
    run: FineTuningRecipe,
    base: GPT,
    adapters: Adapters,
    examples: list[Example],
    width: int,
    tokenizer: Tokenizer,
    heldout: Callable[[GPT], float] | None = None,
    **others: Any,
) -> TrainingJob:
    """The training of `adapters` over `base` on `examples`; `heldout` is the loss of tuned params on rows apart, and
    `others` are what the run reads besides, for its fingerprint.

    Raises InputError where the best state is wanted, and nothing to judge it by.
    """
    if (run.eval_every or run.take == "best") and (heldout is None or not run.eval_every):
        raise InputError(
            "a held-out loss wants rows that are held out, and the best state one each --eval-every N steps"
        )
    steps = num_steps(examples, run, width)
    inputs = fingerprint(run, base, tokenizer, run.base, training_rows=examples, **others)
    schedule = cosine_schedule(run.peak_lr, steps, warmup_steps=run.num_warmup_steps(steps))
    adam = adamw8bit if run.optimizer == "adamw8bit" else adamw
    optimizer = adam(schedule, weight_decay=run.weight_decay)
    step = make_step(
        lambda tuned, frozen, batch, seed: nll(adapt(frozen, tuned, rng=seed), batch, remat=run.remat), optimizer
    )
    frozen = drop_replaced_leaves(base, adapters)
    return TrainingJob(
        run=run,
        step=step,
        frozen=frozen,
        batches=lambda begin: batches(examples, run, width, begin),
        steps=steps,
        schedule=schedule,
        rng=fold_in(key(run.seed), "steps"),
        fingerprint=inputs,
        initial_state=init_state(adapters, optimizer),
        tokenizer=tokenizer,
        heldout=None if heldout is None else lambda tuned: heldout(adapt(frozen, tuned)),
    )


def build_job(run: InstructionRecipe) -> tuple[TrainingJob, list[InstructionRow]]:
    """The training, and the rows held out of it.

    Everything that bad input can spoil is read here, before anything slow begins. Raises InputError.
    """
    look, _ = template(run.template), run_dir.device_of(run.device)
    rows, heldout = split(run)
    cfg, tokenizer = models.load_config_and_tokenizer(run.base)
    width = min(run.max_seq_len, cfg.n_ctx)
    whole = [encode(row, look, tokenizer) for row in progress(rows, "tokenizing")]
    given = [packing.truncate(example, width) for example in whole] if run.overlong == "cut" else whole
    examples, dropped = packing.filter_by_length(given, width, run.overlong != "error")
    if shorter := sum(a is not b for a, b in zip(whole, given, strict=True)):
        console.print(f"cut {shorter} answers where their rows reach {width} tokens")
    if dropped.long or dropped.empty:
        console.print(f"left out {dropped.long} rows longer than {width} tokens and {dropped.empty} without a response")
    apart = [
        x for x in (encode(row, look, tokenizer) for row in heldout) if x.prompt_length + 1 < len(x.tokens) <= width
    ]
    base = load_base(run)
    adapters = build_adapters(run, base)
    judged = (lambda tuned: nats(tuned, apart)) if apart else None
    more = {"heldout_rows": heldout, "template": repr(look)}
    it = assemble_job(run, base, adapters, examples, width, tokenizer, judged, **more)
    weights = sum(len(e.tokens) - e.prompt_length for e in examples)
    announce(
        run.name,
        sizes(run.base, base, adapters),
        f"{len(examples):,} examples, {weights:,} response tokens, {it.steps} steps",
        *low_rate(run.peak_lr, it.steps, run.num_warmup_steps(it.steps)),
    )
    return it, heldout


def sizes(name: str, base: GPT, adapters: Adapters) -> str:
    """How large a base is, and how much is trained of it or beside it."""
    whole, trained = parameters(base), num_trainable(adapters)
    return f"{name} ({whole:,} parameters), {trained:,} trained ({percent(trained / whole)})"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.1g} %"


def low_rate(peak: float, steps: int, warmup: int) -> list[str]:
    """A sentence for a training that ends within its warm-up; none for any other."""
    if warmup <= steps:
        return []
    return [f"it ends within its --warmup-steps {warmup}: of lr {peak:.2g} it reaches {peak * steps / warmup:.2g}"]


def train(run: InstructionRecipe, where: Path | None = None) -> Path:
    """Tune, save, compare; in a new folder, or in `where`, from its last checkpoint on. Returns the run's folder.

    Raises InputError as `plan` and `fit` do.
    """
    it, heldout = build_job(run)
    with run_dir.open_run_dir(run, it.steps, where) as out:
        fitted = train_loop(it, out)
        saved = run_dir.save_tuned(out, it.frozen, fitted.state.trainable, run.base)
        plot_loss(out / run_dir.METRICS, out / run_dir.LOSS, run.name)
        print_saved(fitted, saved)
        if fitted.interrupted:
            console.print(
                f"what was trained so far is usable: just compare {shlex.quote(str(out))}; {resume_hint(out)}"
            )
            raise KeyboardInterrupt
        if run.compare_prompts and heldout:
            compare.compare_after_training(run, out, heldout)
    return out


def print_saved(fitted: TrainResult, saved: Path) -> None:
    """Say how a training ended."""
    end = "interrupted after" if fitted.interrupted else "left the state after"
    console.print(f"{end} {int(fitted.state.step)} steps, {fitted.seconds:.0f} s; saved {saved}")
