"""Instruction tuning, from its recipe to a comparison of base and tuned model."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
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
from fgpt.cli.evaluation.instruction_tuning import answer_metrics, heldout_metrics
from fgpt.cli.evaluation.metrics.text import nats
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.tables import Metrics
from fgpt.cli.training.build import (
    assemble_job,
    build_adapters,
    describe_sizes,
    load_base,
    row_length,
    warn_if_all_warmup,
)
from fgpt.cli.training.examples import load_heldout_rows, load_instruction_data
from fgpt.cli.training.job import TrainingJob
from fgpt.data.classification_datasets import Columns
from fgpt.data.examples import Example, count_loss_tokens
from fgpt.data.pieces import encode_pieces
from fgpt.data.prompt_templates import InstructionRow, pieces, template
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.model import GPT
from fgpt.recipes import InstructionRecipe


@dataclass(frozen=True, eq=False)
class InstructionTask:
    """Tune a base on instructions and their responses."""

    recipe: InstructionRecipe
    job: TrainingJob
    heldout: list[InstructionRow]
    loss_unit: ClassVar[str] = "token"
    report_section: ClassVar[str] = "comparison"

    @classmethod
    def build(cls, recipe: InstructionRecipe) -> "InstructionTask":
        """Raises InputError for bad input."""
        prompt_template = template(recipe.template)
        recipe = resolve_precision(recipe)
        cfg, tokenizer = models.load_config_and_tokenizer(recipe.base)
        max_seq_len = row_length(recipe, cfg)
        data = load_instruction_data(recipe)
        examples, heldout = data.examples, data.heldout
        heldout_examples = []
        for example in encode_pieces([pieces(row, prompt_template, tokenizer) for row in heldout], tokenizer):
            if example.prompt_length + 1 < len(example.tokens) <= max_seq_len:
                heldout_examples.append(example)
        base = load_base(recipe)
        adapters = build_adapters(recipe, base)
        job = assemble_job(
            recipe,
            base,
            adapters=adapters,
            examples=examples,
            max_seq_len=max_seq_len,
            tokenizer=tokenizer,
            heldout_loss=(lambda params: nats(params, heldout_examples)) if heldout_examples else None,
            heldout_rows=heldout,
            template=repr(prompt_template),
        )
        announce(
            recipe.name,
            describe_sizes(recipe.base, base, adapters),
            describe_precision(recipe),
            f"{len(examples):,} examples, {count_loss_tokens(examples):,} response tokens, {job.steps} steps",
            *warn_if_all_warmup(recipe.peak_lr, job.steps, recipe.num_warmup_steps(job.steps)),
        )
        return cls(cast(InstructionRecipe, job.recipe), job, heldout)

    @staticmethod
    def load_base(recipe: InstructionRecipe) -> GPT:
        return load_base(recipe)

    @staticmethod
    def class_names(recipe: InstructionRecipe) -> tuple[str, ...]:
        return ()

    @staticmethod
    def load_heldout_examples(recipe: InstructionRecipe, limit: int) -> list[Example]:
        cfg, tokenizer = models.load_config_and_tokenizer(recipe.base)
        return fitting(cfg, tokenizer, recipe, load_heldout_rows(recipe)[:limit])

    @staticmethod
    def evaluate(recipe: InstructionRecipe, folder: Path, options: RunEvaluationOptions) -> dict[str, Metrics]:
        if (options.test, options.columns, options.labels) != (None, Columns(), ()):
            raise InputError(f"{folder} is not a classifier: leave out --test, --columns and --labels")
        tokenizer, heldout = models.tokenizer(recipe.base), load_heldout_rows(recipe)
        if not heldout:
            run = shlex.quote(str(folder))
            raise InputError(f"{recipe.name} held out no rows: give a text, fgpt eval text FILE --run {run}")
        answered: Sequence[InstructionRow] = ()
        if options.num_generations:
            answered = held_out(contenders.from_runs([recipe], [folder]), heldout, options.num_generations).rows
        params = run_dir.load_tuned(folder, load_base(recipe))
        rows, batch_size = heldout[: options.limit], options.batch_size
        results = {"held out": heldout_metrics(params, tokenizer, recipe, rows=rows, batch_size=batch_size)}
        if answered:
            results["answers"] = answer_metrics(params, tokenizer, recipe, answered)
        return results

    @staticmethod
    def eval_command(folder: str) -> str:
        return f"fgpt eval run {folder}"

    def score_initial(self) -> None:
        """The comparison after training scores the base, too."""

    def save(self, trainable: Adapters, out: Path) -> Path:
        return run_dir.save_tuned(out, self.job.frozen, trainable, self.recipe.base)

    def score(self, trainable: Adapters, out: Path) -> Comparison | None:
        """Answers of base and tuned model to held-out prompts, if the recipe compares any."""
        if not self.recipe.compare_prompts or not self.heldout:
            return None
        return compare.compare_after_training(self.recipe, out, self.heldout)

    def report(self, before: None, after: Comparison | None, out: Path) -> None:
        """Write compare.md, compare.html and compare.json, and print the scores with a few answers."""
        if after is not None:
            compare.save(after, out, compare.NAME)
