"""Instruction tuning, from its recipe to a comparison of base and tuned model."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

from fgpt.adapter_types import Adapters
from fgpt.cli import run_dir
from fgpt.cli.console import announce
from fgpt.cli.devices import describe_precision, resolve_precision
from fgpt.cli.evaluation import compare
from fgpt.cli.evaluation.compare import contenders
from fgpt.cli.evaluation.compare.prompts import held_out
from fgpt.cli.evaluation.compare.results import Comparison
from fgpt.cli.evaluation.compare.scores import fitting
from fgpt.cli.evaluation.instruction_tuning import answer_metrics, response_metrics
from fgpt.cli.evaluation.metrics.text import nats
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.shared_evaluation import check_shared_evaluation
from fgpt.cli.evaluation.tables import Metrics
from fgpt.cli.training import preview
from fgpt.cli.training.build import (
    assemble_job,
    build_adapters,
    describe_sizes,
    load_base,
    row_length,
    save_trained,
    warn_if_all_warmup,
)
from fgpt.cli.training.eval_sets import encode_eval_sets
from fgpt.cli.training.examples import (
    check_data_options,
    encoding_of,
    load_eval_sets,
    load_heldout_rows,
    load_instruction_data,
)
from fgpt.cli.training.format_cost import print_format_cost
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.mixture import mix_sources
from fgpt.cli.training.objectives import check_objective, describe_objective, load_teacher
from fgpt.cli.training.private import check_private_data, is_private
from fgpt.cli.training.row_reports import resolve_template
from fgpt.cli.training.streaming import StreamOrder
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.classification_datasets import Columns
from fgpt.data.examples import Example, count_loss_tokens
from fgpt.data.prompt_templates import template
from fgpt.data.rows import InstructionRow, TextRow
from fgpt.errors import InputError
from fgpt.model import GPT
from fgpt.recipes import InstructionRecipe


@dataclass(frozen=True, eq=False)
class InstructionTask:
    """Tune a base on instructions and their responses."""

    recipe: InstructionRecipe
    job: TrainingJob
    heldout: list[InstructionRow]
    stream: StreamOrder | None = None
    loss_unit: ClassVar[str] = "token"
    report_section: ClassVar[str] = "comparison"

    @classmethod
    def build(cls, recipe: InstructionRecipe) -> "InstructionTask":
        """Raises InputError for bad input."""
        recipe = resolve_precision(recipe)
        loaded = load_tokenizer(recipe)
        cfg, tokenizer, _ = loaded
        recipe = resolve_template(recipe, tokenizer)
        prompt_template, encoding = template(recipe.template), encoding_of(recipe, loaded)
        max_seq_len = row_length(recipe, cfg)
        check_objective(recipe, cfg, tokenizer, max_seq_len)
        check_data_options(recipe)
        eval_sets = load_eval_sets(recipe, encoding)  # first: they are small, and may be misspelled
        data = load_instruction_data(recipe, encoding)
        examples, heldout, mixture = data.examples, data.heldout, mix_sources(recipe, data.by_source)
        if is_private(recipe):
            check_private_data(data, mixture)
        eval_examples = encode_eval_sets(
            heldout, eval_sets, template=prompt_template, tokenizer=tokenizer, max_seq_len=max_seq_len
        )
        unmeasured = bool(eval_sets) and not recipe.eval_every
        base = load_base(recipe)
        adapters = build_adapters(recipe, base)
        job = assemble_job(
            recipe,
            base,
            adapters=adapters,
            examples=examples,
            origin=data.origin,
            max_seq_len=max_seq_len,
            tokenizer=tokenizer,
            mixture=mixture,
            stream=data.stream,
            eval_losses={metric: partial(nats, examples=rows) for metric, rows in eval_examples.items()},
            teacher=load_teacher(recipe),
            heldout_rows=heldout,
            template=repr(prompt_template),
            **{f"evaluation set {name}": rows for name, rows in eval_sets.items()},
        )
        announce(
            recipe.name,
            describe_sizes(recipe.base, base, adapters),
            describe_precision(recipe),
            f"{'at first ' if recipe.streaming else ''}{len(examples):,} examples, "
            f"{count_loss_tokens(examples):,} response tokens, {job.steps} steps",
            *describe_objective(recipe),
            *(["evaluation sets without --eval-every: fgpt eval run alone measures them"] if unmeasured else []),
            *warn_if_all_warmup(recipe.peak_lr, job.steps, recipe.num_warmup_steps(job.steps)),
        )
        print_format_cost(recipe, base, examples)
        preview.print_first(examples[0], tokenizer, recipe.template)
        return cls(cast(InstructionRecipe, job.recipe), job, heldout, data.stream)

    @staticmethod
    def load_base(recipe: InstructionRecipe) -> GPT:
        return load_base(recipe)

    @staticmethod
    def class_names(recipe: InstructionRecipe) -> tuple[str, ...]:
        return ()

    @staticmethod
    def load_heldout_examples(recipe: InstructionRecipe, limit: int) -> list[Example]:
        loaded = load_tokenizer(recipe)
        cfg, tokenizer, _ = loaded
        encoding = encoding_of(recipe, loaded)
        heldout = load_heldout_rows(recipe, encoding)[:limit]
        if not heldout:
            return [*load_instruction_data(recipe, encoding).examples[:limit]]
        return fitting(cfg, tokenizer, recipe, heldout)[:limit]

    @staticmethod
    def evaluate(recipe: InstructionRecipe, folder: Path, options: RunEvaluationOptions) -> dict[str, Metrics]:
        if (options.test, options.columns, options.labels) != (None, Columns(), ()):
            raise InputError(f"{folder} is not a classifier: leave out --test, --columns and --labels")
        encoding = encoding_of(recipe)
        tokenizer, heldout = encoding.tokenizer, load_heldout_rows(recipe, encoding)
        eval_sets = load_eval_sets(recipe, encoding)
        if not heldout and not eval_sets:
            run = shlex.quote(str(folder))
            raise InputError(f"{recipe.name} held out no rows: give a text, fgpt eval text FILE --run {run}")
        answered: Sequence[InstructionRow] = ()
        if options.num_generations:
            answered = held_out(contenders.from_runs([recipe], [folder]), heldout, options.num_generations).rows
        params = run_dir.load_tuned(folder, load_base(recipe))
        check_shared_evaluation(options, params, {"held-out rows": heldout, "evaluation sets": str(eval_sets)})
        results: dict[str, Metrics] = {}
        named_rows = {"held out": ("held-out rows", heldout)} if heldout else {}
        named_rows |= {f"evaluation set {name}": (f"rows of {name}", rows) for name, rows in eval_sets.items()}
        for name, (title, rows) in named_rows.items():
            results[name] = response_metrics(
                params, tokenizer, recipe, rows=rows[: options.limit], batch_size=options.batch_size, title=title
            )
        if answered:
            results["answers"] = answer_metrics(params, tokenizer, recipe, answered)
        return results

    @staticmethod
    def eval_command(folder: str) -> str:
        return f"fgpt eval run {folder}"

    def score_initial(self) -> None:
        """The comparison after training scores the base, too."""

    def save(self, trainable: Adapters, out: Path) -> Path:
        return save_trained(self.recipe, self.job, trainable, out)

    def score(self, trainable: Adapters, out: Path) -> Comparison | None:
        """Answers of base and tuned model to held-out prompts, if the recipe compares any. Of a stream it is printed
        how much was read.
        """
        if self.stream is not None:
            self.stream.report()
        prompts = [row for row in self.heldout if not isinstance(row, TextRow)]
        if not self.recipe.compare_prompts or not prompts:
            return None
        return compare.compare_after_training(self.recipe, out, prompts)

    def report(self, before: None, after: Comparison | None, out: Path) -> None:
        """Write compare.md, compare.html and compare.json, and print the scores with a few answers."""
        if after is not None:
            compare.save(after, out, compare.NAME)
