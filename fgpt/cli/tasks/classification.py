"""Classification: training a classifier, from its recipe to its scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, cast

from rich.table import Table

from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt, trainable_leaves
from fgpt.cli import run_dir
from fgpt.cli.console import announce, console, result_console, show_progress
from fgpt.cli.devices import describe_precision, resolve_precision
from fgpt.cli.evaluation.classification import classification_metrics, load_test_set, score, with_other_data
from fgpt.cli.evaluation.metrics.classes import Scores, majority, plot_confusion
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.shared_evaluation import check_shared_evaluation
from fgpt.cli.evaluation.tables import Metrics
from fgpt.cli.inference.classifiers import label_choices, prompt_frame_of, with_head
from fgpt.cli.metrics_log import HELDOUT_LOSS
from fgpt.cli.training.build import (
    assemble_job,
    build_adapters,
    describe_sizes,
    load_base,
    row_length,
    save_trained,
    warn_if_all_warmup,
)
from fgpt.cli.training.examples import load_classification_split, train_heldout_split, warn_of_shared_texts
from fgpt.cli.training.format_cost import print_format_cost
from fgpt.cli.training.job import Origin, TrainingJob
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.classification_prompts import Labels, encode, parse_labels, resolve_labels, sample_shots
from fgpt.data.examples import Example
from fgpt.errors import InputError
from fgpt.io.files import write_json
from fgpt.model import GPT
from fgpt.recipes.classification import ClassificationRecipe
from fgpt.rng import fold_in, key

ScoreTable: TypeAlias = dict[str, tuple[Scores, float | None]]
"""Scores and mean loss (nats per example) of each model, by its name."""


def build_trainable(recipe: ClassificationRecipe, params: GPT) -> Adapters:
    """What the recipe trains: its adapter, the leaves it tunes as well, and the classification head if it has one.

    Raises InputError if a target matches nothing that can be adapted.
    """
    trainable = build_adapters(recipe, params)
    if recipe.tune_also:
        trainable |= trainable_leaves(params, recipe.tune_also)
    if recipe.head == "classifier":
        trainable |= trainable_leaves(params, r"head\..*")
    return trainable


@dataclass(frozen=True, eq=False)
class ClassificationTask:
    """Train a classifier: a classification head, or labels as next tokens."""

    recipe: ClassificationRecipe
    job: TrainingJob
    labels: Labels
    max_seq_len: int
    majority: Scores
    """Of always predicting the most frequent label of the training rows."""
    test_examples: list[Example]
    fewshot_examples: list[Example]
    """The same rows with shots before them, for the base alone; empty without shots."""
    loss_unit: ClassVar[str] = "example"
    report_section: ClassVar[str] = "scores"

    @classmethod
    def build(cls, recipe: ClassificationRecipe) -> "ClassificationTask":
        """Raises InputError for bad input."""
        recipe = resolve_precision(recipe)
        if recipe.num_fewshot and recipe.head == "classifier":
            raise InputError(
                f"--num-fewshot {recipe.num_fewshot} needs labels as next tokens: give --head lm, or leave it out"
            )
        cfg, tokenizer, _ = load_tokenizer(recipe)
        names, train, test = resolve_labels(recipe.labels, *load_classification_split(recipe))
        recipe = replace(recipe, labels=recipe.labels or names)
        heldout = []
        if recipe.eval_every:
            train, heldout = train_heldout_split(train, min(recipe.num_heldout, len(train) // 2), recipe.seed)
        labels, frame = label_choices(recipe, names, tokenizer), prompt_frame_of(recipe, names, tokenizer)
        max_seq_len = row_length(recipe, cfg)
        with show_progress("tokenizing"):
            examples, truncated = encode(train, labels, frame, tokenizer, max_seq_len)
            test_examples, test_truncated = encode(test, labels, frame, tokenizer, max_seq_len)
            heldout_examples, _ = encode(heldout, labels, frame, tokenizer, max_seq_len)
        if truncated + test_truncated:
            console.print(
                f"{truncated:,} of {len(train):,} training rows and {test_truncated:,} of {len(test):,} test rows are "
                f"longer than {max_seq_len} tokens: their texts lose their middle"
            )
        fewshot_examples: list[Example] = []
        if recipe.num_fewshot:
            shots = sample_shots(train, names, recipe.num_fewshot, fold_in(key(recipe.seed), "shots"))
            fewshot_frame = prompt_frame_of(recipe, names, tokenizer, shots)
            fewshot_examples = encode(test, labels, fewshot_frame, tokenizer, cfg.n_ctx).examples
        base = with_head(recipe, load_base(recipe), names)
        adapters = build_trainable(recipe, base)

        def origin(index: int) -> Origin:
            row = train[index]
            return Origin(recipe.train, row.number, row.where.removeprefix(f"{recipe.train}, "), row.label)

        job = assemble_job(
            recipe,
            base,
            adapters=adapters,
            examples=examples,
            origin=origin,
            max_seq_len=max_seq_len,
            tokenizer=tokenizer,
            eval_losses={HELDOUT_LOSS: lambda params: score(params, heldout_examples, labels, max_seq_len)[1]}
            if heldout_examples
            else {},
            test_rows=test_examples,
            rows_with_shots=fewshot_examples,
            heldout_rows=heldout_examples,
            labels=f"{labels} {frame}",
        )
        announce(
            recipe.name,
            describe_sizes(recipe.base, base, adapters),
            describe_precision(recipe),
            f"{len(train):,} rows of {len(names)} labels ({', '.join(names)}), {job.steps} steps",
            f"{len(test):,} test rows",
            *warn_of_shared_texts(train, test),
            *warn_if_all_warmup(recipe.peak_lr, job.steps, recipe.num_warmup_steps(job.steps)),
        )
        print_format_cost(recipe, base, examples)
        train_labels, test_labels = ([names.index(row.label) for row in rows] for rows in (train, test))
        baseline = majority(train_labels, test_labels, len(names))
        return cls(
            cast(ClassificationRecipe, job.recipe), job, labels, max_seq_len, baseline, test_examples, fewshot_examples
        )

    @staticmethod
    def load_base(recipe: ClassificationRecipe) -> GPT:
        return with_head(recipe, load_base(recipe), recipe.labels)

    @staticmethod
    def class_names(recipe: ClassificationRecipe) -> tuple[str, ...]:
        return tuple(parse_labels(recipe.labels).values()) if recipe.head == "classifier" else ()

    @staticmethod
    def load_heldout_examples(recipe: ClassificationRecipe, limit: int) -> list[Example]:
        return load_test_set(recipe, limit).examples

    @staticmethod
    def evaluate(recipe: ClassificationRecipe, folder: Path, options: RunEvaluationOptions) -> dict[str, Metrics]:
        if options.num_generations is not None:
            raise InputError(f"{folder} is a classifier, which generates no answers: leave out --num-generations")
        recipe = with_other_data(recipe, options)
        test_set = load_test_set(recipe, options.limit)
        base = ClassificationTask.load_base(recipe)
        params = run_dir.load_tuned(folder, base)
        check_shared_evaluation(options, params, {"test rows": test_set.examples})
        results: dict[str, Metrics] = {}
        if options.labels:
            results["test rows, untuned"] = classification_metrics(base, test_set, "test rows, untuned")
        return results | {"test rows": classification_metrics(params, test_set)}

    @staticmethod
    def eval_command(folder: str) -> str:
        return f"fgpt eval run {folder}"

    def score_initial(self) -> ScoreTable:
        """The scores of the majority label and, if labels are next tokens, of the base without and with shots."""
        table: ScoreTable = {"majority-class baseline": (self.majority, None)}
        if self.recipe.head == "lm":
            trainable = self.job.initial_state.peek().trainable
            base = adapt(self.job.frozen, trainable)  # new adapters change nothing
            table["base"] = self._score(base, self.test_examples)
            print_scores("base", *table["base"])
            if self.fewshot_examples:
                table[f"base, {self.recipe.num_fewshot} shots"] = self._score(base, self.fewshot_examples)
        return table

    def save(self, trainable: Adapters, out: Path) -> Path:
        save_trained(self.recipe, self.job, trainable, out)
        return out

    def score(self, trainable: Adapters, out: Path) -> ScoreTable:
        return {"tuned": self._score(adapt(self.job.frozen, trainable), self.test_examples)}

    def report(self, before: ScoreTable, after: ScoreTable, out: Path) -> None:
        """Write metrics.json and confusion.png, and print the scores."""
        report(self.recipe.name, self.labels.names, len(self.test_examples), before | after, out)

    def _score(self, params: GPT, examples: list[Example]) -> tuple[Scores, float]:
        return score(params, examples, self.labels, self.max_seq_len)


def print_scores(name: str, values: Scores, loss: float) -> None:
    console.print(f"{name}: accuracy {values['accuracy']:.3f}, macro-F1 {values['macro_f1']:.3f}, loss {loss:.3f}")


def report(name: str, labels: Sequence[str], num_rows: int, table: ScoreTable, out: Path) -> None:
    """Write metrics.json and confusion.png of the run `name`, and print the scores of each model."""
    as_json: dict[str, Any] = {model: {**values, "loss": loss} for model, (values, loss) in table.items()}
    write_json(out / run_dir.SCORES, {"labels": list(labels), "rows": num_rows, "scores": as_json})
    plot_confusion(table["tuned"][0], labels, out / run_dir.CONFUSION, f"{name}: {num_rows:,} rows")
    view = Table("", "accuracy", "macro-F1", "loss", title=f"{num_rows:,} test rows", title_justify="left")
    for model, (values, loss) in table.items():
        loss_text = "" if loss is None else f"{loss:.3f}"
        view.add_row(model, f"{values['accuracy']:.3f}", f"{values['macro_f1']:.3f}", loss_text)
    result_console.print(view)
    console.print(f"confusion matrix: {out / run_dir.CONFUSION}; all figures: {out / run_dir.SCORES}")
