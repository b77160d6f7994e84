"""What `just eval` says of a trained run by its own rows: how likely it finds answers that it was not trained on, how
good those are that it writes itself, and how well it tells classes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from fgpt.cli import run_dir
from fgpt.cli.console import console, working
from fgpt.cli.evaluation import compare
from fgpt.cli.evaluation.compare import contenders as compare_sides
from fgpt.cli.evaluation.compare import prompts as compare_asked
from fgpt.cli.evaluation.compare.scores import asked_scores, rouge_scores, shape_scores
from fgpt.cli.evaluation.metrics.text import answers
from fgpt.cli.inference import classifiers
from fgpt.cli.training import classification
from fgpt.cli.training.instruction_tuning import load_base, split
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

Figures = dict[str, float | int | None]
"""By name; None is infinity."""


def run_of(at: Path) -> InstructionRecipe | ClassificationRecipe:
    """The run that made a folder. Raises InputError for one that neither follows instructions nor classifies."""
    if not isinstance(run := run_dir.read_run(at), InstructionRecipe | ClassificationRecipe):
        raise InputError(f"{at}: a pretrained model has no rows of its own; {run_dir.use_of(at, run)}")
    return run


def of_others(
    run: ClassificationRecipe, test: str | None, columns: Columns, given: tuple[str, ...]
) -> ClassificationRecipe:
    """The run on rows or labels that are not its own. Raises InputError for labels that cannot be."""
    own = run.columns if columns == Columns() else columns
    return replace(
        run, test=run.test if test is None else test, columns=own, labels=classifiers.labels_or_own(run, given)
    )


def own(
    run: InstructionRecipe | ClassificationRecipe,
    at: Path,
    loss: bool,
    answers: int | None,
    limit: int | None,
    at_once: int,
) -> Callable[[GPT], dict[str, Figures]]:
    """What a run is to show on its own rows. They are read now, and its model looked at later: of a run of instructions
    with `loss` that of the first `limit` rows it held out, and the scores of `answers` to as many; of a run that tells
    classes how well it does.

    Raises InputError where there are no such rows.
    """
    if isinstance(run, ClassificationRecipe):
        it = load_test_set(run, limit)
        return lambda params: {"test rows": of_classes(params, it)}
    if not loss and answers is None:
        return lambda params: {}
    tokenizer, held = models.load_config_and_tokenizer(run.base)[1], split(run)[1]
    if not held:
        raise InputError(f"{run.name} held out no rows: give --text FILE or --tasks NAMES")
    asked = compare_asked.held_out(compare_sides.from_runs([run], [at]), held, answers).rows if answers else ()

    def told(params: GPT) -> dict[str, Figures]:
        found = {"held out": of_heldout(params, tokenizer, run, held[:limit], at_once)} if loss else {}
        return found | ({"answers": of_answers(params, tokenizer, run, asked)} if asked else {})

    return told


# --------------------------------------------------------------------------------------------- a run of instructions


def of_heldout(
    params: GPT, tokenizer: Tokenizer, run: InstructionRecipe, rows: Sequence[InstructionRow], at_once: int
) -> Figures:
    """Loss and perplexity of the rows' own answers, end of text included, where they fit the run's width."""
    examples = [encode(row, template(run.template), tokenizer) for row in rows]
    kept, dropped = packing.filter_by_length(examples, min(run.max_seq_len, params.cfg.n_ctx), drop=True)
    told = [x for part in scored(params, answers(kept), at_once) for x in part.logprobs]
    loss = -math.fsum(told) / len(told)
    counts = {"rows": len(kept), "rows left out": dropped.long + dropped.empty, "response tokens": len(told)}
    both = {"response loss (nats per token)": loss, "response perplexity": math.exp(min(loss, 700))}
    return shown("held-out rows", counts, both)


def of_answers(params: GPT, tokenizer: Tokenizer, run: InstructionRecipe, rows: Sequence[InstructionRow]) -> Figures:
    """The scores of greedy answers to the rows, as `just compare` has them, but for what takes the base."""
    prompts = compare_sides.prompts(compare_sides.Contender("", run), rows, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    found = compare.answers(params, tokenizer, prompts, order, run.max_new_tokens)
    figures = asked_scores(rows, found) | rouge_scores(rows, found) | shape_scores(found)
    return shown("answers to held-out rows", {"rows": len(rows), "most tokens": run.max_new_tokens}, figures)


# ----------------------------------------------------------------------------------------------- a run of classes


class TestSet(NamedTuple):
    """Rows that a classifier was not trained on."""

    examples: list[Example]
    labels: classification_prompts.Labels
    width: int
    cut: int
    """How many of them lost the middle of a text."""


def load_test_set(run: ClassificationRecipe, limit: int | None) -> TestSet:
    """The first `limit` rows that were scored after training. Raises InputError as reading them for training does."""
    cfg, tokenizer = models.load_config_and_tokenizer(run.base)
    names, rows = classification_prompts.apply_labels(
        classification_prompts.parse_labels(run.labels), classification.to_score(run)
    )
    own, width = classifiers.labels_of(run, names, tokenizer), min(run.max_seq_len, cfg.n_ctx)
    examples, cut = classification_prompts.encode(
        rows[:limit], own, classifiers.frame_of(run, names, tokenizer), tokenizer, width
    )
    return TestSet(examples, own, width, cut)


def untuned_scores(run: ClassificationRecipe, limit: int | None) -> Figures:
    """How well the base alone tells the rows of a run whose labels are next tokens.

    Raises InputError as `unseen` does.
    """
    return of_classes(load_base(run), load_test_set(run, limit), "test rows, untuned")


def of_classes(params: GPT, it: TestSet, title: str = "test rows") -> Figures:
    """How well a classifier tells the rows, by the scores that it had after training."""
    scores, loss = classification.score(params, it.examples, it.labels, it.width)
    counts = {"rows": len(it.examples), "rows that lost their middle": it.cut, "classes": len(it.labels.names)}
    figures = {"accuracy": scores["accuracy"], "macro-F1": scores["macro_f1"], "loss (nats per row)": loss}
    return shown(title, counts, figures)


# ---------------------------------------------------------------------------------------------------------- showing


def scored(params: GPT, pairs: Sequence[Request], rows: int) -> list[LogLikelihood]:
    """`fgpt.evaluate.score` which shows how far it is."""
    some: Iterator[list[tuple[int, LogLikelihood]]] = iter_loglikelihood(params, pairs, batch_size=rows)
    found: dict[int, LogLikelihood] = {}
    with working("scoring", len(pairs)) as advance:
        for part in some:
            found.update(part)
            advance(len(part))
    return [found[i] for i in range(len(pairs))]


def shown(title: str, counts: Mapping[str, int], figures: Mapping[str, float]) -> Figures:
    """Print both, and return them as one."""
    table = Table("", title, title_justify="left")
    table.columns[1].justify = "right"
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    table.add_section()
    for name, x in figures.items():
        table.add_row(name, f"{x:.4f}" if x < 1e6 else f"{x:.4g}")
    console.print(table)
    return {**counts, **{name: x if math.isfinite(x) else None for name, x in figures.items()}}
