"""Preference tuning, from its recipe to the held-out pairs and the answers of base and tuned model.

result.json    held-out pairs before and after: accuracy, margin and divergence from the base
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt
from fgpt.cli import run_dir
from fgpt.cli.console import announce, console
from fgpt.cli.devices import describe_precision, resolve_precision
from fgpt.cli.evaluation import compare
from fgpt.cli.evaluation.compare.results import Comparison
from fgpt.cli.metrics_log import HELDOUT_LOSS
from fgpt.cli.tasks.instruction_tuning import InstructionTask
from fgpt.cli.training.build import (
    build_adapters,
    describe_sizes,
    drop_replaced_leaves,
    load_base,
    make_tuning_step,
    row_length,
    warn_if_all_warmup,
    with_graphs,
)
from fgpt.cli.training.examples import NANO_HELDOUT, num_heldout, train_heldout_split
from fgpt.cli.training.job import InitialState, TrainingJob, fingerprint
from fgpt.cli.training.nano_rows import read_tasks
from fgpt.cli.training.objectives import OBJECTIVE_OPTIONS, refuse_options
from fgpt.cli.training.optimizers import make_optimizer, make_schedule
from fgpt.cli.training.preference_batches import (
    PreferenceExamples,
    Reference,
    batch_of,
    batches,
    no_reference,
    preference_order,
    reference_logprobs,
)
from fgpt.cli.training.row_reports import resolve_template
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.conversations import Message
from fgpt.data.examples import Example
from fgpt.data.preferences import Judgment, Preference, load_judgments, load_preferences
from fgpt.data.prompt_templates import Template, encode, template
from fgpt.data.rows import InstructionRow, Turn, conversation_row
from fgpt.errors import InputError
from fgpt.io.files import write_json
from fgpt.model import GPT
from fgpt.objectives.distillation import distillation
from fgpt.objectives.dpo import dpo
from fgpt.objectives.kto import JudgedBatch, kto
from fgpt.objectives.logprobs import sequence_logprobs
from fgpt.objectives.orpo import orpo
from fgpt.objectives.pairs import PairBatch
from fgpt.objectives.simpo import simpo
from fgpt.recipes.preference import PreferenceRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import init_state
from fgpt.tree import device, tree_map

EVALUATION_ROWS = 8
"""Held-out pairs that are scored at a time."""


def objective(recipe: PreferenceRecipe, params: GPT, batch: PairBatch | JudgedBatch) -> tuple[Tensor, Tensor]:
    """(Σ loss, number of rows) of the recipe's objective."""
    options: dict[str, Any] = {"beta": recipe.resolved_beta, "remat": recipe.remat, "compile": recipe.compile}
    if isinstance(batch, JudgedBatch):
        weights = {"desirable_weight": recipe.desirable_weight, "undesirable_weight": recipe.undesirable_weight}
        return kto(params, batch, **weights, **options)
    if recipe.objective == "orpo":
        return orpo(params, batch, **options)
    if recipe.objective == "simpo":
        return simpo(params, batch, gamma=recipe.gamma, **options)
    options |= {"label_smoothing": recipe.label_smoothing, "rpo_alpha": recipe.rpo_alpha}
    return dpo(params, batch, loss_type=recipe.loss_type, **options)


@dataclass(frozen=True)
class HeldOutRows:
    """What is held out: as rows for the comparison, and as tokens."""

    rows: list[InstructionRow]
    examples: PreferenceExamples
    reference: Reference


@dataclass(frozen=True, eq=False)
class PreferenceTask:
    """Tune a base on preferences."""

    recipe: PreferenceRecipe
    job: TrainingJob
    heldout: HeldOutRows
    loss_unit: ClassVar[str] = "row"
    report_section: ClassVar[str] = "comparison"

    @classmethod
    def build(cls, recipe: PreferenceRecipe) -> "PreferenceTask":
        """Raises InputError for bad input."""
        check_options(recipe)
        recipe = cast(PreferenceRecipe, resolve_template(resolve_precision(recipe)))
        prompt_template = template(recipe.template)
        train, heldout = load_split(recipe)
        cfg, tokenizer, _ = load_tokenizer(recipe)
        max_seq_len = row_length(recipe, cfg)
        examples = encode_rows(recipe, train, prompt_template, tokenizer, max_seq_len)
        heldout_examples = encode_rows(recipe, heldout, prompt_template, tokenizer, max_seq_len, "held-out ")
        base = load_base(recipe)
        adapters = build_adapters(recipe, base)
        has_reference = recipe.objective in ("dpo", "kto")
        make_reference = reference_logprobs if has_reference else lambda _, rows: no_reference(rows)
        reference = make_reference(base, examples)
        heldout_reference = make_reference(base, heldout_examples)
        heldout_rows = HeldOutRows([chosen_row(x) for x in heldout], heldout_examples, heldout_reference)
        order = preference_order(examples, recipe)
        steps = order.num_steps()
        schedule = make_schedule(recipe, steps)
        optimizer = make_optimizer(recipe, schedule)
        step = make_tuning_step(
            optimizer,
            lambda params, batch: objective(recipe, params, batch),
            neftune_noise_alpha=recipe.neftune_noise_alpha,
        )
        frozen = drop_replaced_leaves(base, adapters)
        micro_batch_size = recipe.rows_per_update // recipe.grad_accumulation_steps
        rows = [*examples.chosen, *examples.rejected, *heldout_examples.chosen, *heldout_examples.rejected]
        labels = f"{examples.labels} {heldout_examples.labels}"
        width = order.max_seq_len if recipe.cuda_graphs else None
        job = TrainingJob(
            recipe=recipe,
            step=with_graphs(recipe, step),
            frozen=frozen,
            batches=lambda begin: cast(Any, batches(order, examples, reference, micro_batch_size, begin, width)),
            steps=steps,
            schedule=schedule,
            rng=fold_in(key(recipe.seed), "steps"),
            fingerprint=fingerprint(recipe, base, tokenizer, recipe.base, training_rows=rows, labels=labels),
            initial_state=InitialState(init_state(adapters, optimizer)),
            tokenizer=tokenizer,
            eval_losses={HELDOUT_LOSS: lambda tuned: heldout_loss(recipe, adapt(frozen, tuned), heldout_rows)},
            evaluation_params=lambda state: optimizer.evaluation_params(state.opt_state, state.trainable),
        )
        announce(
            recipe.name,
            describe_sizes(recipe.base, base, adapters),
            describe_precision(recipe),
            describe_rows(recipe, examples, steps),
            *warn_if_all_warmup(recipe.peak_lr, steps, recipe.num_warmup_steps(steps)),
        )
        return cls(recipe, job, heldout_rows)

    @staticmethod
    def load_base(recipe: PreferenceRecipe) -> GPT:
        return load_base(recipe)

    @staticmethod
    def class_names(recipe: PreferenceRecipe) -> tuple[str, ...]:
        return ()

    @staticmethod
    def load_heldout_examples(recipe: PreferenceRecipe, limit: int) -> list[Example]:
        cfg, tokenizer, _ = load_tokenizer(recipe)
        rows = load_split(recipe)[1][:limit]
        max_seq_len = row_length(recipe, cfg)
        return list(encode_rows(recipe, rows, template(recipe.template), tokenizer, max_seq_len).chosen)

    @staticmethod
    def evaluate(recipe: PreferenceRecipe, folder: Path, options: Any) -> dict[str, Any]:
        cfg, tokenizer, _ = load_tokenizer(recipe)
        rows = load_split(recipe)[1][: options.limit]
        examples = encode_rows(recipe, rows, template(recipe.template), tokenizer, row_length(recipe, cfg))
        base = load_base(recipe)
        heldout_rows = HeldOutRows([], examples, reference_logprobs(base, examples))
        figures = pair_figures(recipe, run_dir.load_tuned(folder, base), base, heldout_rows)
        print_figures(figures)
        return {"held-out pairs": figures}

    @staticmethod
    def eval_command(folder: str) -> str:
        return InstructionTask.eval_command(folder)

    def score_initial(self) -> None:
        """The base is its own reference: nothing is to be scored."""

    def save(self, trainable: Adapters, out: Path) -> Path:
        return run_dir.save_tuned(out, self.job.frozen, trainable, self.recipe.base)

    def score(self, trainable: Adapters, out: Path) -> Comparison | None:
        """The figures of held-out pairs, and the answers of base and tuned model."""
        base = load_base(self.recipe)
        figures = pair_figures(self.recipe, adapt(base, trainable), base, self.heldout)
        print_figures(figures)
        write_json(out / run_dir.RESULT, figures | {"heldout_rows": len(self.heldout.examples)})
        rows = comparison_rows(self.recipe, self.heldout.rows)
        if not self.recipe.compare_prompts or not rows:
            return None
        return compare.compare_after_training(self.recipe, out, rows)

    def report(self, before: None, after: Comparison | None, out: Path) -> None:
        """Write compare.md, compare.html and compare.json, and print the scores with a few answers."""
        if after is not None:
            compare.save(after, out, compare.NAME)


def check_options(recipe: PreferenceRecipe) -> None:
    """Raises InputError for options that the objective does not have."""
    of_dpo = {"--loss-type": "sigmoid", "--label-smoothing": 0, "--rpo-alpha": 0}
    values = (recipe.loss_type, recipe.label_smoothing, recipe.rpo_alpha)
    for (name, default), value in zip(of_dpo.items(), values, strict=True):
        if recipe.objective != "dpo" and value != default:
            raise InputError(f"--objective {recipe.objective} has no {name}: give {name} {default}")
    if recipe.label_smoothing and (recipe.loss_type not in ("sigmoid", "robust") or recipe.label_smoothing >= 0.5):
        raise InputError(
            f"--label-smoothing {recipe.label_smoothing:g}: expected a share below 0.5, and the loss type sigmoid or "
            "robust"
        )
    if recipe.objective != "kto" and (recipe.desirable_weight, recipe.undesirable_weight) != (1, 1):
        raise InputError(
            f"--desirable-weight and --undesirable-weight belong to kto: leave them out with {recipe.objective}"
        )
    refuse_options(recipe, "eval_data", "streaming", "assistant_turns", *OBJECTIVE_OPTIONS)


# ---------------------------------------------------------------------------------------------------------------- rows

Row: TypeAlias = Preference | Judgment


def load_split(recipe: PreferenceRecipe) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out. Raises InputError as the readers do."""
    read = load_judgments if recipe.objective == "kto" else load_preferences
    rows: list[Row] = [row for source in recipe.data for row in read(source)]
    return train_heldout_split(rows, num_heldout(rows, recipe.num_heldout, ", ".join(recipe.data)), recipe.seed)


def prompt_of(row: Row) -> tuple[Message, ...]:
    """The messages before the answer, none of which is trained on."""
    messages = row.prompt if isinstance(row, Preference) else row.messages
    return tuple(replace(message, weight=0.0) for message in messages)


def chosen_row(row: Row) -> InstructionRow:
    """The prompt with its chosen answer; a judged answer is no reference, and left out."""
    answer = "\n\n".join(message.content for message in row.chosen) if isinstance(row, Preference) else ""
    prompt = prompt_of(row)
    return Turn(prompt[-1].content, "", answer, prompt)


def encode_rows(
    recipe: PreferenceRecipe,
    rows: Sequence[Row],
    prompt_template: Template,
    tokenizer: Tokenizer,
    max_seq_len: int,
    which: str = "",
) -> PreferenceExamples:
    """The rows as tokens. How many are left out because an answer is too long is printed.

    Raises InputError if one is and the recipe's `overlong` is "error", and if none remains.
    """

    def example(row: Row, answer: Sequence[Message]) -> Example:
        return encode(conversation_row((*prompt_of(row), *answer), row.where), prompt_template, tokenizer)

    chosen: list[Example] = []
    rejected: list[Example] = []
    labels: list[bool] = []
    number_long = 0
    for i, row in enumerate(rows):
        if isinstance(row, Preference):
            both = example(row, row.chosen), example(row, row.rejected)
        else:  # the answer of the next row is the mismatched one
            other = rows[(i + 1) % len(rows)]
            assert isinstance(other, Judgment)
            both = example(row, row.answer), example(row, other.answer)
        if max(len(x.tokens) for x in both) > max_seq_len:
            number_long += 1
            if recipe.overlong == "error":
                raise InputError(
                    f"row {i + 1} has an answer that ends after {max_seq_len} tokens: shorten it, raise --max-seq-len, "
                    "or give --overlong drop"
                )
            continue
        chosen.append(both[0])
        rejected.append(both[1])
        labels += [row.label] if isinstance(row, Judgment) else []
    if number_long:
        console.print(f"left out {number_long} {which}rows with an answer beyond {max_seq_len} tokens")
    if rows and not chosen:
        raise InputError(f"no {which}row fits {max_seq_len} tokens: raise --max-seq-len")
    return PreferenceExamples(chosen, rejected, tuple(labels) if recipe.objective == "kto" else None)


def describe_rows(recipe: PreferenceRecipe, examples: PreferenceExamples, steps: int) -> str:
    if examples.labels is None:
        return f"{len(examples):,} pairs, {recipe.objective}, beta {recipe.resolved_beta:g}, {steps} steps"
    good = sum(examples.labels)
    return f"{good:,} good and {len(examples) - good:,} bad answers, beta {recipe.resolved_beta:g}, {steps} steps"


def comparison_rows(recipe: PreferenceRecipe, heldout: list[InstructionRow]) -> list[InstructionRow]:
    """What base and tuned model answer: the embedded held-out instructions if the base is made for them."""
    return list(read_tasks(NANO_HELDOUT)) if recipe.compare_data == "nano" else heldout


# ------------------------------------------------------------------------------------------------------------- figures


@torch.no_grad()
def heldout_loss(recipe: PreferenceRecipe, params: GPT, heldout_rows: HeldOutRows) -> float:
    """The mean loss of the held-out rows."""
    total, count = 0.0, 0.0
    for batch in _heldout_batches(params, heldout_rows):
        loss, number = objective(recipe, params, batch)
        total, count = total + float(loss), count + float(number)
    return total / count


@torch.no_grad()
def pair_figures(recipe: PreferenceRecipe, params: GPT, base: GPT, heldout_rows: HeldOutRows) -> dict[str, float]:
    """Of held-out rows: the share in which the implicit reward of the chosen answer is higher, the mean margin of the
    rewards, and KL(policy ‖ base) per token of the answers.
    """
    margins: list[Tensor] = []
    divergence = tokens = 0.0
    for batch in _heldout_batches(params, heldout_rows):
        answers = batch.batch
        total, weight = distillation(base, answers, teacher=params)
        divergence, tokens = divergence + float(total), tokens + float(weight)
        if isinstance(batch, PairBatch):
            ratios = sequence_logprobs(params, answers).sums - sequence_logprobs(base, answers).sums
            chosen, rejected = (recipe.resolved_beta * ratios).chunk(2)
            margins.append(chosen - rejected)
    figures = {"kl": divergence / tokens} if tokens else {}
    if margins:
        margin = torch.cat(margins)
        figures |= {"accuracy": float((margin > 0).float().mean()), "margin": float(margin.mean())}
    return {name: x for name, x in figures.items() if math.isfinite(x)}


def _heldout_batches(params: GPT, heldout_rows: HeldOutRows) -> list[PairBatch | JudgedBatch]:
    indices = range(len(heldout_rows.examples))
    parts = [indices[i : i + EVALUATION_ROWS] for i in range(0, len(indices), EVALUATION_ROWS)]
    batches_of_rows = [batch_of(heldout_rows.examples, heldout_rows.reference, part) for part in parts]
    return [tree_map(lambda x: x.to(device(params)), batch) for batch in batches_of_rows]


def print_figures(figures: dict[str, float]) -> None:
    names = {"accuracy": "the chosen answer has the higher reward in", "margin": "margin", "kl": "KL from the base"}
    parts = []
    for name, text in names.items():
        if name not in figures:
            continue
        value = f"{100 * figures[name]:.1f} %" if name == "accuracy" else f"{figures[name]:.4f}"
        parts.append(f"{text} {value}" + (" nats per token" if name == "kl" else ""))
    if parts:
        console.print(f"held-out rows: {', '.join(parts)}")
