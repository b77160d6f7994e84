"""Preference tuning, from its recipe to the held-out pairs and the answers of base and tuned model.

result.json    held-out pairs before and after: accuracy, margin and divergence from the base
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt
from fgpt.cli import run_dir
from fgpt.cli.console import announce, result_console
from fgpt.cli.devices import describe_precision, resolve_precision
from fgpt.cli.evaluation import compare
from fgpt.cli.evaluation.compare.results import Comparison
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.shared_evaluation import check_shared_evaluation
from fgpt.cli.evaluation.tables import Metrics
from fgpt.cli.tasks.instruction_tuning import InstructionTask
from fgpt.cli.training.build import (
    build_adapters,
    describe_sizes,
    drop_replaced_leaves,
    load_base,
    row_length,
    save_trained,
    warn_if_all_warmup,
)
from fgpt.cli.training.examples import NANO_HELDOUT
from fgpt.cli.training.format_cost import print_format_cost
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.nano_rows import read_tasks
from fgpt.cli.training.objectives import refuse_instruction_options
from fgpt.cli.training.preference_batches import (
    PreferenceExamples,
    Reference,
    map_heldout,
    no_reference,
    reference_logprobs,
)
from fgpt.cli.training.preference_job import assemble_preference_job
from fgpt.cli.training.preference_rows import HELD_OUT, chosen_row, encode_rows, load_split
from fgpt.cli.training.reference_cache import cached_reference
from fgpt.cli.training.row_reports import resolve_template
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.classification_datasets import Columns
from fgpt.data.examples import Example
from fgpt.data.prompt_templates import template
from fgpt.data.rows import InstructionRow
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
from fgpt.tree import device


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
        recipe = resolve_precision(recipe)
        train, heldout = load_split(recipe, recipe.objective == "kto")
        cfg, tokenizer, _ = load_tokenizer(recipe)
        recipe = cast(PreferenceRecipe, resolve_template(recipe, tokenizer))
        prompt_template = template(recipe.template)
        max_seq_len = row_length(recipe, cfg)
        examples = encode_rows(recipe, train, prompt_template, tokenizer, max_seq_len)
        heldout_examples = encode_rows(recipe, heldout, prompt_template, tokenizer, max_seq_len, HELD_OUT)
        base = load_base(recipe)
        adapters = build_adapters(recipe, base)
        has_reference = recipe.objective in ("dpo", "kto")
        make_reference = cached_reference if has_reference else lambda _, rows: no_reference(rows)
        reference = make_reference(base, examples)
        heldout_reference = make_reference(base, heldout_examples)
        heldout_rows = HeldOutRows([chosen_row(x) for x in heldout], heldout_examples, heldout_reference)
        frozen = drop_replaced_leaves(base, adapters)
        job = assemble_preference_job(
            recipe,
            base,
            frozen,
            adapters=adapters,
            examples=examples,
            reference=reference,
            objective=lambda params, batch: objective(recipe, params, batch),
            tokenizer=tokenizer,
            heldout=heldout_examples,
            heldout_loss=lambda params: heldout_loss(recipe, params, heldout_rows),
        )
        announce(
            recipe.name,
            describe_sizes(recipe.base, base, adapters),
            describe_precision(recipe),
            describe_rows(recipe, examples, job.steps),
            *warn_if_all_warmup(recipe.peak_lr, job.steps, recipe.num_warmup_steps(job.steps)),
        )
        print_format_cost(recipe, base, examples.chosen)
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
        train, heldout = load_split(recipe, recipe.objective == "kto")
        rows, max_seq_len = (heldout or train)[:limit], row_length(recipe, cfg)
        return list(encode_rows(recipe, rows, template(recipe.template), tokenizer, max_seq_len, HELD_OUT).chosen)

    @staticmethod
    def evaluate(recipe: PreferenceRecipe, folder: Path, options: RunEvaluationOptions) -> dict[str, Metrics]:
        if (options.test, options.columns, options.labels) != (None, Columns(), ()) or options.num_generations:
            raise InputError(
                f"{folder} is evaluated on its held-out rows: leave out --test, --columns, --labels and "
                "--num-generations; fgpt compare shows answers"
            )
        cfg, tokenizer, _ = load_tokenizer(recipe)
        rows = load_split(recipe, recipe.objective == "kto")[1][: options.limit]
        if not rows:
            raise InputError(f"{folder} held out no rows: there is nothing to score it on")
        examples = encode_rows(recipe, rows, template(recipe.template), tokenizer, row_length(recipe, cfg), HELD_OUT)
        base = load_base(recipe)
        params = run_dir.load_tuned(folder, base)
        check_shared_evaluation(options, params, {"chosen": examples.chosen, "rejected": examples.rejected})
        heldout_rows = HeldOutRows([], examples, reference_logprobs(base, examples))
        figures = pair_figures(recipe, params, base, heldout_rows)
        print_figures(figures)
        return {"held-out pairs": {**figures}}

    @staticmethod
    def eval_command(folder: str) -> str:
        return InstructionTask.eval_command(folder)

    def score_initial(self) -> None:
        """The base is its own reference: nothing is to be scored."""

    def save(self, trainable: Adapters, out: Path) -> Path:
        return save_trained(self.recipe, self.job, trainable, out)

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
    if recipe.objective != "simpo" and recipe.gamma != PreferenceRecipe.gamma:
        raise InputError(f"--gamma is of simpo: leave it out with --objective {recipe.objective}")
    if recipe.objective == "kto" and recipe.rows_per_update < 2 * recipe.grad_accumulation_steps:
        raise InputError("--micro-batch-size 1: kto estimates a divergence in each micro-batch: give 2 rows or more")
    refuse_instruction_options(recipe)


def describe_rows(recipe: PreferenceRecipe, examples: PreferenceExamples, steps: int) -> str:
    if examples.labels is None:
        return f"{len(examples):,} pairs, {recipe.objective}, beta {recipe.resolved_beta:g}, {steps} steps"
    good = sum(examples.labels)
    return f"{good:,} good and {len(examples) - good:,} bad answers, beta {recipe.resolved_beta:g}, {steps} steps"


def comparison_rows(recipe: PreferenceRecipe, heldout: list[InstructionRow]) -> list[InstructionRow]:
    """What base and tuned model answer: the embedded held-out instructions if the base is made for them."""
    return list(read_tasks(NANO_HELDOUT)) if recipe.compare_data == "nano" else heldout


# ------------------------------------------------------------------------------------------------------------- figures


def heldout_loss(recipe: PreferenceRecipe, params: GPT, heldout_rows: HeldOutRows) -> float:
    """The mean loss of the held-out rows."""

    def score(batch: PairBatch | JudgedBatch) -> tuple[float, float]:
        loss, number = objective(recipe, params, batch)
        return float(loss), float(number)

    total, count = 0.0, 0.0
    for loss, number in map_heldout(score, heldout_rows.examples, heldout_rows.reference, device(params)):
        total, count = total + loss, count + number
    return total / count


def pair_figures(recipe: PreferenceRecipe, params: GPT, base: GPT, heldout_rows: HeldOutRows) -> dict[str, float]:
    """Of held-out rows: the share in which the implicit reward of the chosen answer is higher, the mean margin of the
    rewards, and KL(policy ‖ base) per token of the answers.
    """

    def compare(batch: PairBatch | JudgedBatch) -> tuple[float, float, Tensor | None]:
        answers = batch.batch
        total, weight = distillation(base, answers, teacher=params)
        if not isinstance(batch, PairBatch):
            return float(total), float(weight), None
        policy = sequence_logprobs(params, answers)
        has_reference = recipe.objective == "dpo"
        rewards = policy.sums - sequence_logprobs(base, answers).sums if has_reference else policy.means
        chosen, rejected = (recipe.resolved_beta * rewards).chunk(2)
        return float(total), float(weight), (chosen - rejected).cpu()

    margins: list[Tensor] = []
    divergence = tokens = 0.0
    for total, weight, margin in map_heldout(compare, heldout_rows.examples, heldout_rows.reference, device(params)):
        divergence, tokens = divergence + total, tokens + weight
        margins += [] if margin is None else [margin]
    figures = {"kl": divergence / tokens} if tokens else {}
    if margins:
        margin = torch.cat(margins)
        figures |= {"accuracy": float((margin > 0).float().mean()), "margin": float(margin.mean())}
    return {name: x for name, x in figures.items() if math.isfinite(x)}


def print_figures(figures: dict[str, float]) -> None:
    names = {"accuracy": "the chosen answer has the higher reward in", "margin": "margin", "kl": "KL from the base"}
    parts = []
    for name, text in names.items():
        if name not in figures:
            continue
        value = f"{100 * figures[name]:.1f} %" if name == "accuracy" else f"{figures[name]:.4f}"
        parts.append(f"{text} {value}" + (" nats per token" if name == "kl" else ""))
    if parts:
        result_console.print(f"held-out rows: {', '.join(parts)}")
