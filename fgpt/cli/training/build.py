"""Builders of what a fine-tuning trains: the base, its adapters, the batches, and the job that puts them together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fgpt.adapter_dora import dora, with_norms
from fgpt.adapter_ia3 import ia3
from fgpt.adapter_lora import lora
from fgpt.adapter_trainable_tokens import trainable_tokens
from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt, dora_norms, num_trainable, trainable_leaves
from fgpt.classification_head import num_classes
from fgpt.cli.console import console, show_progress
from fgpt.cli.devices import resolve_device, resolve_dtype
from fgpt.cli.pages.formatting import percent
from fgpt.cli.run_dir import save_tuned
from fgpt.cli.training import mfu
from fgpt.cli.training.hashes import model_hash
from fgpt.cli.training.initial_adapters import initialize, trained_before
from fgpt.cli.training.job import InitialState, Origin, RowIndices, TrainingJob, fingerprint, place
from fgpt.cli.training.micro_batch import with_largest_micro_batch
from fgpt.cli.training.objectives import token_loss
from fgpt.cli.training.optimizers import make_optimizer, make_schedule
from fgpt.cli.training.private import plan_private
from fgpt.cli.training.row_order import LotOrder, RowOrder
from fgpt.cli.training.shared_models import load_once
from fgpt.cli.training.streaming import StreamOrder
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data import packing
from fgpt.data.examples import Example, count_loss_tokens, example_lengths
from fgpt.data.mixtures import Mixture
from fgpt.distributed import world
from fgpt.embedding_noise import neftune
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.layers import num_parameters, weight_matrices
from fgpt.losses import Batch, pad_loss_positions
from fgpt.model import GPT, Config, fuse_qkv
from fgpt.optim import Optimizer
from fgpt.quantization import quantize
from fgpt.recipes import FineTuningRecipe, InstructionRecipe
from fgpt.rng import fold_in, key
from fgpt.sharding import shard
from fgpt.step_graphs import StepGraphs
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import Loss, Step, init_state, make_step
from fgpt.transforms.privacy import GaussianMechanism, leaves_without_gradient, private_step
from fgpt.tree import device, leaves, matches, replace_at
from fgpt.vocabulary import with_rows
from fgpt.weights import dtype

T = TypeVar("T")

QKV, ALL_BUT_QKV = r"blocks\..*\.attn\.qkv", r"blocks\.(?!.*\.attn\.[qkv]$).*"
"""What is quantized after q, k and v are fused, and what while it is read."""


def load_base(recipe: FineTuningRecipe) -> GPT:
    """The base in its dtype, quantized while it is read, on the recipe's device; q, k and v fused if the recipe adapts
    them as one; with rows for the recipe's new tokens.

    Raises InputError if there is no such base or device, or the base is a classifier.
    """
    what = recipe.base, recipe.device, recipe.dtype, recipe.quantize, recipe.new_tokens, adapts_fused_qkv(recipe)
    return load_once((*what, shares_base(recipe)), lambda: _load_base(recipe))


def _load_base(recipe: FineTuningRecipe) -> GPT:
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, device)
    rotate = recipe.quantize == "rotated-int8"
    format = "int8" if recipe.quantize == "rotated-int8" else recipe.quantize
    with show_progress(f"loading {recipe.base}"):
        if adapts_fused_qkv(recipe):
            params = models.load(recipe.base, dtype, format, target=ALL_BUT_QKV, device=device, rotate=rotate)
            params = fuse_qkv(params)
            params = params if format is None else quantize(params, format, rotate=rotate, target=QKV)
        else:
            params = models.load(recipe.base, dtype, format, device=device, rotate=rotate, shard=shares_base(recipe))
        if (classes := num_classes(params)) is not None:
            raise InputError(f"{recipe.base} is a classifier of {classes} classes: expected a language model")
        if recipe.new_tokens:
            params = with_rows(params, 1 + max(load_tokenizer(recipe).new_ids))
        return _with_tables_in_parts(recipe, params) if shares_base(recipe) else params


def _with_tables_in_parts(recipe: FineTuningRecipe, params: GPT) -> GPT:
    """`params` with those of its embeddings and its head in parts that the recipe trains whole."""
    if recipe.adapter.kind != "full":
        return params
    tables = [path for path in weight_matrices(params) if not path.startswith("blocks.")]
    trained = [path for path in tables if matches(recipe.adapter.target_pattern, f"{path}.w")]
    return shard(params, target="|".join(trained)) if trained else params


def shares_base(recipe: FineTuningRecipe) -> bool:
    """Whether several processes hold the base in parts."""
    return recipe.shard_base and world().size > 1


def adapts_fused_qkv(recipe: FineTuningRecipe) -> bool:
    """Whether the recipe adapts q, k and v as one matrix, so that its base holds them fused."""
    pattern = recipe.adapter.target_pattern
    return bool(matches(pattern, "blocks.0.attn.qkv")) and not matches(pattern, "blocks.0.attn.q")


def build_adapters(recipe: FineTuningRecipe, params: GPT) -> Adapters:
    """The recipe's adapters, and the rows of its new tokens where they are not trained already.

    Raises InputError if the target matches nothing that this kind of adapter can adapt, or the embedding has an adapter
    and new tokens.
    """
    adapters = trained_before(recipe, params, _of_kind(recipe, params))
    if not recipe.new_tokens:
        return adapters
    tables = ["wte"] if params.head is None or num_classes(params) is not None else ["wte", "head"]
    if both := [path for path in tables if path in adapters]:
        raise InputError(
            f"--adapter.target adapts {both[0]}, and --new-tokens trains rows of it: leave {both[0]} out of the target"
        )
    frozen = [path for path in tables if f"{path}.w" not in adapters]
    return adapters | (trainable_tokens(params, load_tokenizer(recipe).new_ids, "|".join(frozen)) if frozen else {})


def _of_kind(recipe: FineTuningRecipe, params: GPT) -> Adapters:
    adapter, rng = recipe.adapter, fold_in(key(recipe.seed), "lora")
    if adapter.kind in ("lora", "dora"):
        make = lora if adapter.kind == "lora" else dora
        return make(
            params,
            rng,
            adapter.rank,
            adapter.alpha,
            adapter.target_pattern,
            adapter.rs,
            adapter.dropout,
            rank_pattern=adapter.ranks,
            alpha_pattern=adapter.alphas,
        )
    if adapter.kind == "ia3":
        return ia3(params) if adapter.target is None else ia3(params, adapter.target, None)
    return trainable_leaves(params, adapter.target_pattern)


def drop_replaced_leaves(params: GPT, adapters: Adapters) -> GPT:
    """`params` without the storage of the leaves that `adapters` replace: full tuning then holds its weights once."""
    replaced = {*adapters, *(f"{path}.part" for path in adapters)}
    return replace_at(params, {path: x.to("meta") for path, x in leaves(params).items() if path in replaced})


WIDTH_UNIT = 64
"""Tokens. A CPU's products keep a kernel for each width that they meet."""


def batches(
    order: RowOrder | StreamOrder | LotOrder, micro_batch_size: int, width: int | None = None, begin: int = 0
) -> Iterator[list[Batch]]:
    """The micro-batches of one update after the other, from update `begin` on, without end; none for an empty lot.

    Args:
        order: The rows of each update.
        micro_batch_size: The maximum number of rows of a micro-batch.
        width: The length of every row; None fills each micro-batch up to a multiple of `WIDTH_UNIT`.
        begin: The first update, counted from 0.
    """
    for rows in order.updates(begin):
        parts = split_update(rows, micro_batch_size)
        yield [packing.collate(part, width or _whole_units(part, order.max_seq_len)) for part in parts]


def split_update(rows: list[T], micro_batch_size: int) -> list[list[T]]:
    """The rows of an update as those of its micro-batches."""
    return [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]


def _whole_units(rows: list[list[Example]], max_seq_len: int) -> int:
    longest = max(sum(len(example.tokens) for example in row) for row in rows)
    return min(max_seq_len, -(-longest // WIDTH_UNIT) * WIDTH_UNIT)


def with_graphs(recipe: FineTuningRecipe, step: Step) -> Step:
    """The step of a training: recorded as CUDA graphs, if the recipe says so."""
    return StepGraphs(step) if recipe.cuda_graphs else step


def row_width(recipe: FineTuningRecipe, device: torch.device, max_seq_len: int) -> int | None:
    """The width that all rows are padded to: on CUDA each new width costs a kernel's plan, in a compiled program a
    compilation, and packed rows are nearly full (at one width 3 to 4 % of the positions are padding, at ragged ones 2
    to 3 %). None on a CPU without a compiler, where a width costs little, and for rows of one example, which are mostly
    far shorter.
    """
    is_packed = not isinstance(recipe, InstructionRecipe) or recipe.packing
    return max_seq_len if (device.type == "cuda" and is_packed) or recipe.compile or recipe.cuda_graphs else None


def row_length(recipe: FineTuningRecipe, cfg: Config) -> int:
    """Tokens in a row: the recipe's, or the context of the model if that is shorter, which is then printed."""
    if recipe.max_seq_len > cfg.n_ctx:
        console.print(f"rows have {cfg.n_ctx} tokens, the context of the model; --max-seq-len is {recipe.max_seq_len}")
    return min(recipe.max_seq_len, cfg.n_ctx)


def assemble_job(
    recipe: FineTuningRecipe,
    base: GPT,
    *,
    adapters: Adapters,
    examples: Sequence[Example],
    max_seq_len: int,
    tokenizer: Tokenizer,
    mixture: Mixture | None = None,
    stream: StreamOrder | None = None,
    eval_losses: Mapping[str, Callable[[GPT], float]] | None = None,
    teacher: GPT | None = None,
    origin: Callable[[int], Origin] | None = None,
    **others: Any,
) -> TrainingJob:
    """The training of `adapters` over `base` on `examples`.

    Args:
        max_seq_len: tokens in a row, into which examples are packed.
        mixture: what an epoch draws of the examples; None takes each once.
        stream: the rows of each update, if `examples` are only the first ones of a stream.
        eval_losses: losses of tuned params on held-out rows and on evaluation sets, by the names of their metrics.
        teacher: what the recipe distills.
        origin: where each of `examples` comes from, by its index.
        others: what the training reads besides, for its fingerprint.

    Raises InputError if evaluations are requested and there are no rows for them.
    """
    if isinstance(recipe.eval_every, int) and not eval_losses:
        raise InputError(f"--eval-every {recipe.eval_every} needs held-out examples, and there are none")
    target, private = device(adapters), None
    objective = token_loss(recipe, teacher)
    order: RowOrder | StreamOrder | LotOrder
    if recipe.privacy.epsilon is None:
        order = stream or RowOrder(examples, recipe, max_seq_len, mixture)
    else:
        order = LotOrder(examples, recipe, max_seq_len)

    def first_batches() -> Iterator[list[Batch]]:
        return ([place(batch, target) for batch in update] for update in batches(order, 4))

    first = initialize(recipe, base, adapters, first_batches, objective)
    adapters, frozen = first.adapters, drop_replaced_leaves(first.base, first.adapters)
    if isinstance(order, LotOrder):
        private = plan_private(recipe, order, base.cfg)
        others |= {"noise_multiplier": str(private.mechanism.noise_multiplier)}
        _check_gradients(adapters, frozen, objective, order)
    steps = order.num_steps()
    schedule = make_schedule(recipe, steps)
    optimizer = make_optimizer(recipe, schedule)

    def step_of(optimizer: Optimizer) -> Step:
        mechanism = None if private is None else private.mechanism
        alpha = recipe.neftune_noise_alpha
        return make_tuning_step(optimizer, objective, neftune_noise_alpha=alpha, mechanism=mechanism)

    step, state = step_of(optimizer), init_state(adapters, optimizer)
    seed = recipe.seed if recipe.privacy.seed is None else recipe.privacy.seed
    rng = fold_in(key(seed), "steps")
    if recipe.micro_batch_size == "auto":

        def probe(num_rows: int) -> None:
            rows = packing.collate(order.first_rows(num_rows), max_seq_len)
            step(state, frozen, [place(rows, target)], rng)

        recipe = with_largest_micro_batch(recipe, target, probe)
    micro_batch_size = recipe.rows_per_update // recipe.grad_accumulation_steps
    if mixture is not None and mixture.counts != mixture.sizes:
        others |= {"mixture": str(mixture)}
    if teacher is not None:
        others |= {"teacher": model_hash(teacher)}
    hashes = fingerprint(recipe, base, tokenizer, recipe.base, training_rows=examples, **others)

    def all_batches(begin: int) -> Iterator[list[Batch]]:
        updates = batches(order, micro_batch_size, row_width(recipe, target, max_seq_len), begin)
        return map(pad_loss_positions, updates) if recipe.cuda_graphs else updates

    def row_indices(begin: int) -> Iterator[list[RowIndices]]:
        assert isinstance(order, RowOrder)
        return (split_update(rows, micro_batch_size) for rows in order.indices(begin))

    def of_tuned(loss: Callable[[GPT], float]) -> Callable[[Adapters], float]:
        return lambda tuned: loss(adapt(frozen, tuned))

    return TrainingJob(
        recipe=recipe,
        step=with_graphs(recipe, step),
        frozen=frozen,
        batches=all_batches,
        steps=steps,
        schedule=schedule,
        rng=rng,
        fingerprint=hashes,
        initial_state=InitialState(state),
        tokenizer=tokenizer,
        eval_losses={name: of_tuned(loss) for name, loss in (eval_losses or {}).items()},
        step_for=lambda schedule, weight_decay: step_of(make_optimizer(recipe, schedule, weight_decay)),
        evaluation_params=lambda state: optimizer.evaluation_params(state.opt_state, state.trainable),
        examples=examples,
        origin=origin,
        loss=tuning_loss(token_loss(replace(recipe, compile=False), teacher)),
        row_indices=row_indices if isinstance(order, RowOrder) else None,
        mfu=_utilization(base, adapters, examples) if target.type == "cuda" else None,
        saved=first.saved,
        steps_per_epoch=None if isinstance(order, StreamOrder) else order.steps_per_epoch,
        epsilon=None if private is None else private.epsilon,
    )


def _check_gradients(
    adapters: Adapters, frozen: GPT, objective: Callable[[GPT, Any], tuple[Tensor, Tensor]], order: LotOrder
) -> None:
    """Raises InputError for a leaf of no gradient in the first examples: in a private training the noise moves it, and
    the guard of leaves that do not change would not notice.
    """
    parts = [order.first_rows(order.num_examples)[i : i + 4] for i in range(0, min(order.num_examples, 64), 4)]
    rows = [place(packing.collate(part), device(adapters)) for part in parts]
    loss, constants = tuning_loss(objective), (frozen, dora_norms(frozen, adapters))
    if silent := leaves_without_gradient(loss, adapters, constants, rows):
        raise InputError(
            f"{len(silent)} of {len(leaves(adapters))} trained leaves have no gradient ({', '.join(silent[:4])}): only "
            "noise would move them; leave them out by --adapter.target"
        )


def make_tuning_step(
    optimizer: Optimizer,
    objective: Callable[[GPT, Any], tuple[Tensor, Tensor]],
    *,
    neftune_noise_alpha: float = 0.0,
    mechanism: GaussianMechanism | None = None,
) -> Step:
    """The step of a tuning. The norms of a DoRA are computed once for all micro-batches.

    Args:
        optimizer: The optimizer of the adapters.
        objective: (Σ loss, Σ weight) of adapted params and a batch.
        neftune_noise_alpha: see `fgpt.neftune`.
        mechanism: Of a private training.
    """
    loss = tuning_loss(objective, neftune_noise_alpha)

    def prepare(tuned: Adapters, frozen: GPT) -> tuple[GPT, dict[str, Tensor]]:
        return frozen, dora_norms(frozen, tuned)

    if mechanism is not None:
        return private_step(loss, optimizer, mechanism, prepare=prepare, world=world())
    return make_step(loss, optimizer, prepare=prepare, world=world())


def tuning_loss(objective: Callable[[GPT, Any], tuple[Tensor, Tensor]], neftune_noise_alpha: float = 0.0) -> Loss:
    """The loss of adapters over the frozen base and the norms of its DoRAs."""

    def loss(
        tuned: Adapters, constants: tuple[GPT, dict[str, Tensor]], batch: Any, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        frozen, norms = constants
        params = adapt(frozen, with_norms(tuned, norms), rng=seed)
        return objective(neftune(params, neftune_noise_alpha, seed), batch)

    return loss


def save_trained(recipe: FineTuningRecipe, job: TrainingJob, trainable: Adapters, out: Path) -> Path:
    """Save what a tuning has trained as `save_tuned` does, with the tokenizer if the recipe adds tokens."""
    tokenizer = job.tokenizer if recipe.new_tokens else None
    return save_tuned(out, job.frozen, job.saved(trainable), recipe.base, tokenizer)


def _utilization(base: GPT, adapters: Adapters, examples: Sequence[Example]) -> Callable[[float], float]:
    """Model FLOPs utilization at a number of tokens per second, in the dtype of `base`."""
    loss_share = count_loss_tokens(examples) / int(example_lengths(examples).sum())
    flops, peak = mfu.tuning_flops(base, adapters, loss_share), mfu.peak(device(base), dtype(base.wte.w))
    return lambda tokens_per_second: tokens_per_second * flops / peak


def describe_sizes(name: str, base: GPT, adapters: Adapters) -> str:
    """How many parameters a base has, and how many are trained."""
    total, trained = num_parameters(base), num_trainable(adapters)
    return f"{name} ({total:,} parameters), {trained:,} trained ({percent(trained / total)})"


def warn_if_all_warmup(peak_lr: float, steps: int, warmup_steps: int) -> list[str]:
    """One sentence for a training that ends within its warm-up; none for any other."""
    if warmup_steps <= steps:
        return []
    reached = peak_lr * steps / warmup_steps
    return [f"it ends within its --warmup-steps {warmup_steps}: of lr {peak_lr:.2g} it reaches {reached:.2g}"]
