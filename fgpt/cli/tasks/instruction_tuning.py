"""Instruction tuning, from its recipe to a comparison of base and tuned model."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

from fgpt.adapter_types import Adapters
from fgpt.cli import run_dir
from fgpt.cli.console import announce, console
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
from fgpt.cli.training import preview
from fgpt.cli.training.build import (
    assemble_job,
    build_adapters,
    describe_sizes,
    load_base,
    row_length,
    warn_if_all_warmup,
)
from fgpt.cli.training.conversation_rows import encode_rows, resolve_template
from fgpt.cli.training.examples import load_instruction_split
from fgpt.cli.training.job import TrainingJob
from fgpt.data import packing
from fgpt.data.classification_datasets import Columns
from fgpt.data.examples import Example, truncate
from fgpt.data.prompt_templates import Template, encode, template
from fgpt.data.rows import InstructionRow
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.model import GPT
from fgpt.recipes import InstructionRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer


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
        recipe = resolve_template(resolve_precision(recipe))
        prompt_template = template(recipe.template)
        rows, heldout = load_instruction_split(recipe)
        cfg, tokenizer = models.load_config_and_tokenizer(recipe.base)
        max_seq_len = row_length(recipe, cfg)
        examples = _encode_rows(recipe, rows, prompt_template, tokenizer, max_seq_len)
        heldout_examples = []
        for row in heldout:
            example = encode(row, prompt_template, tokenizer)
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
        response_tokens = sum(example.num_loss_tokens for example in examples)
        announce(
            recipe.name,
            describe_sizes(recipe.base, base, adapters),
            describe_precision(recipe),
            f"{len(examples):,} examples, {response_tokens:,} response tokens, {job.steps} steps",
            *warn_if_all_warmup(recipe.peak_lr, job.steps, recipe.num_warmup_steps(job.steps)),
        )
        preview.print_first(examples[0], tokenizer, recipe.template)
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
        return fitting(cfg, tokenizer, recipe, load_instruction_split(recipe)[1][:limit])

    @staticmethod
    def evaluate(recipe: InstructionRecipe, folder: Path, options: RunEvaluationOptions) -> dict[str, Metrics]:
        if (options.test, options.columns, options.labels) != (None, Columns(), ()):
            raise InputError(f"{folder} is not a classifier: leave out --test, --columns and --labels")
        tokenizer, heldout = models.tokenizer(recipe.base), load_instruction_split(recipe)[1]
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


def _encode_rows(
    recipe: InstructionRecipe,
    rows: list[InstructionRow],
    prompt_template: Template,
    tokenizer: Tokenizer,
    max_seq_len: int,
) -> list[Example]:
    """Examples to train on, of at most `max_seq_len` tokens. How many were truncated or left out is printed, and how
    many conversations are an example for each answer.

    Raises InputError for a longer row if the recipe's `overlong` is "error".
    """
    examples, num_divided = encode_rows(rows, prompt_template, tokenizer)
    if num_divided:
        console.print(
            f"the chat template rewrites earlier turns, or does not end them: {num_divided:,} conversations are an "
            "example for each answer"
        )
    if recipe.overlong == "cut":
        full_length = examples
        examples = [truncate(example, max_seq_len) for example in full_length]
        if truncated := sum(a is not b for a, b in zip(full_length, examples, strict=True)):
            console.print(f"truncated {truncated} responses of rows longer than {max_seq_len} tokens")
    examples, dropped = packing.filter_by_length(examples, max_seq_len, recipe.overlong != "error")
    if dropped.long or dropped.empty:
        console.print(
            f"left out {dropped.long} rows longer than {max_seq_len} tokens and {dropped.empty} without a response"
        )
    return examples
