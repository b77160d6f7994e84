"""`just eval` of a trained run on its own rows: the loss of held-out answers, the scores of generated answers, and the
accuracy of a classifier.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from fgpt.cli import run_dir
from fgpt.cli.console import console, show_progress
from fgpt.cli.evaluation.compare import contenders, generate_answers
from fgpt.cli.evaluation.compare.prompts import held_out
from fgpt.cli.evaluation.compare.scores import instruction_scores, rouge_scores, shape_scores
from fgpt.cli.evaluation.metrics.text import requests
from fgpt.cli.inference import classifiers
from fgpt.cli.training import classification
from fgpt.cli.training.build import load_base
from fgpt.cli.training.examples import load_instruction_split, load_test_texts
from fgpt.data import classification_prompts, packing
from fgpt.data.classification_datasets import Columns
from fgpt.data.prompt_templates import Example, InstructionRow, encode, template
from fgpt.errors import InputError
from fgpt.evaluation.likelihood import LogLikelihood, Request, iter_loglikelihood
from fgpt.io import models
from fgpt.model import GPT
from fgpt.recipes import InstructionRecipe
from fgpt.recipes.classification import ClassificationRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer

Metrics = dict[str, float | int | None]
"""By name; None is infinity."""


def read_run(folder: Path) -> InstructionRecipe | ClassificationRecipe:
    """The run of a run directory. Raises InputError for one that is neither instruction tuning nor classification."""
    if not isinstance(run := run_dir.read_run(folder), InstructionRecipe | ClassificationRecipe):
        raise InputError(f"{folder}: a pretrained model has no rows of its own; {run_dir.suggest_use(folder, run)}")
    return run


def with_other_data(
    run: ClassificationRecipe, test: str | None, columns: Columns, labels: tuple[str, ...]
) -> ClassificationRecipe:
    """The run with other rows or labels than its own. Raises InputError for labels that it cannot have."""
    return replace(
        run,
        test=run.test if test is None else test,
        columns=run.columns if columns == Columns() else columns,
        labels=classifiers.resolve_inference_labels(run, labels),
    )


def own_rows_evaluation(
    run: InstructionRecipe | ClassificationRecipe,
    folder: Path,
    loss: bool,
    num_generations: int | None,
    limit: int | None,
    batch_size: int,
) -> Callable[[GPT], dict[str, Metrics]]:
    """The evaluation of a run on its own rows: a function of its model. The rows are read now.

    Args:
        loss: Whether to measure the loss of held-out answers; a classifier is always scored.
        num_generations: Held-out prompts to answer; None for none.
        limit: Only the first rows; None for all.

    Raises InputError if there are no such rows.
    """
    if isinstance(run, ClassificationRecipe):
        test_set = load_test_set(run, limit)
        return lambda params: {"test rows": classification_metrics(params, test_set)}
    if not loss and num_generations is None:
        return lambda params: {}
    tokenizer, heldout = models.load_config_and_tokenizer(run.base)[1], load_instruction_split(run)[1]
    if not heldout:
        raise InputError(f"{run.name} held out no rows: give --text FILE or --tasks NAMES")
    rows: Sequence[InstructionRow] = ()
    if num_generations:
        rows = held_out(contenders.from_runs([run], [folder]), heldout, num_generations).rows

    def evaluate(params: GPT) -> dict[str, Metrics]:
        metrics = {}
        if loss:
            metrics["held out"] = heldout_metrics(params, tokenizer, run, heldout[:limit], batch_size)
        if rows:
            metrics["answers"] = answer_metrics(params, tokenizer, run, rows)
        return metrics

    return evaluate


# ------------------------------------------------------------------------------------------------- instruction tuning


def heldout_metrics(
    params: GPT, tokenizer: Tokenizer, run: InstructionRecipe, rows: Sequence[InstructionRow], batch_size: int
) -> Metrics:
    """Loss and perplexity of the reference answers, EOS included, of the rows that fit the run's max_seq_len."""
    examples = [encode(row, template(run.template), tokenizer) for row in rows]
    fitting, dropped = packing.filter_by_length(examples, min(run.max_seq_len, params.cfg.n_ctx), drop=True)
    logprobs = [x for answer in loglikelihoods(params, requests(fitting), batch_size) for x in answer.logprobs]
    loss = -math.fsum(logprobs) / len(logprobs)
    counts = {"rows": len(fitting), "rows left out": dropped.long + dropped.empty, "response tokens": len(logprobs)}
    values = {"response loss (nats per token)": loss, "response perplexity": math.exp(min(loss, 700))}
    return print_metrics("held-out rows", counts, values)


def answer_metrics(
    params: GPT, tokenizer: Tokenizer, run: InstructionRecipe, rows: Sequence[InstructionRow]
) -> Metrics:
    """The scores of greedy answers to the rows, as `just compare` computes them, but for those that need the base."""
    prompts = contenders.encode_prompts(contenders.Contender("", run), rows, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers = generate_answers(params, tokenizer, prompts, order, run.max_new_tokens)
    scores = instruction_scores(rows, answers) | rouge_scores(rows, answers) | shape_scores(answers)
    return print_metrics("answers to held-out rows", {"rows": len(rows), "max new tokens": run.max_new_tokens}, scores)


# ----------------------------------------------------------------------------------------------------- classification


class TestSet(NamedTuple):
    """Rows that a classifier was not trained on."""

    examples: list[Example]
    labels: classification_prompts.Labels
    width: int
    num_truncated: int
    """How many of them lost the middle of a text."""


def load_test_set(run: ClassificationRecipe, limit: int | None) -> TestSet:
    """The first `limit` rows of those scored after training. Raises InputError as reading them for training does."""
    cfg, tokenizer = models.load_config_and_tokenizer(run.base)
    names, rows = classification_prompts.apply_labels(
        classification_prompts.parse_labels(run.labels), load_test_texts(run)
    )
    labels, width = classifiers.label_choices(run, names, tokenizer), min(run.max_seq_len, cfg.n_ctx)
    examples, num_truncated = classification_prompts.encode(
        rows[:limit], labels, classifiers.prompt_frame_of(run, names, tokenizer), tokenizer, width
    )
    return TestSet(examples, labels, width, num_truncated)


def untuned_scores(run: ClassificationRecipe, limit: int | None) -> Metrics:
    """The scores of the base alone on the rows of a run whose labels are next tokens.

    Raises InputError as `load_test_set` does.
    """
    return classification_metrics(load_base(run), load_test_set(run, limit), "test rows, untuned")


def classification_metrics(params: GPT, test_set: TestSet, title: str = "test rows") -> Metrics:
    """The scores of a classifier on the rows, as they are computed after training."""
    scores, loss = classification.score(params, test_set.examples, test_set.labels, test_set.width)
    counts = {
        "rows": len(test_set.examples),
        "truncated rows": test_set.num_truncated,
        "classes": len(test_set.labels.names),
    }
    values = {"accuracy": scores["accuracy"], "macro-F1": scores["macro_f1"], "loss (nats per row)": loss}
    return print_metrics(title, counts, values)


# ------------------------------------------------------------------------------------------------------------- helpers


def loglikelihoods(params: GPT, pairs: Sequence[Request], batch_size: int) -> list[LogLikelihood]:
    """`fgpt.evaluation.likelihood.loglikelihood` with a progress bar."""
    found: dict[int, LogLikelihood] = {}
    with show_progress("scoring", len(pairs)) as advance:
        for batch in iter_loglikelihood(params, pairs, batch_size=batch_size):
            found.update(batch)
            advance(len(batch))
    return [found[i] for i in range(len(pairs))]


def print_metrics(title: str, counts: Mapping[str, int], values: Mapping[str, float]) -> Metrics:
    """Print both, and return them as one."""
    table = Table("", title, title_justify="left")
    table.columns[1].justify = "right"
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    table.add_section()
    for name, value in values.items():
        table.add_row(name, f"{value:.4f}" if value < 1e6 else f"{value:.4g}")
    console.print(table)
    return {**counts, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
