"""The scores of a classifier on rows that it was not trained on."""

from dataclasses import replace
from typing import NamedTuple

from fgpt.cli.evaluation.metrics.classes import Scores, scores
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.tables import Metrics, print_metrics
from fgpt.cli.inference.classifiers import label_choices, log_probabilities, prompt_frame_of, resolve_inference_labels
from fgpt.cli.training.examples import load_test_texts
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.classification_datasets import Columns
from fgpt.data.classification_prompts import Labels, apply_labels, encode, parse_labels
from fgpt.data.examples import Example
from fgpt.model import GPT
from fgpt.recipes import ClassificationRecipe


class TestSet(NamedTuple):
    """Rows that a classifier was not trained on."""

    examples: list[Example]
    labels: Labels
    max_seq_len: int
    num_truncated: int
    """How many of them lost the middle of a text."""


def load_test_set(recipe: ClassificationRecipe, limit: int | None) -> TestSet:
    """The first `limit` rows of those scored after training; None takes all. Raises InputError as reading them for
    training does.
    """
    cfg, tokenizer, _ = load_tokenizer(recipe)
    names, rows = apply_labels(parse_labels(recipe.labels), load_test_texts(recipe))
    labels, frame = label_choices(recipe, names, tokenizer), prompt_frame_of(recipe, names, tokenizer)
    max_seq_len = min(recipe.max_seq_len, cfg.n_ctx)
    examples, num_truncated = encode(rows[:limit], labels, frame, tokenizer, max_seq_len)
    return TestSet(examples, labels, max_seq_len, num_truncated)


def with_other_data(recipe: ClassificationRecipe, options: RunEvaluationOptions) -> ClassificationRecipe:
    """The recipe with the rows and labels of the options. Raises InputError for labels that it cannot have."""
    return replace(
        recipe,
        test=recipe.test if options.test is None else options.test,
        columns=recipe.columns if options.columns == Columns() else options.columns,
        labels=resolve_inference_labels(recipe, options.labels),
    )


def score(params: GPT, examples: list[Example], labels: Labels, max_seq_len: int) -> tuple[Scores, float]:
    """Scores, and the mean loss in nats per example."""
    logprobs = log_probabilities(params, examples, labels, max_seq_len)
    truth = [labels.output_ids.index(x.label) for x in examples if x.label is not None]
    loss = -logprobs[range(len(truth)), truth].mean()
    return scores(truth, logprobs.argmax(-1).tolist(), len(labels.names)), float(loss)


def classification_metrics(params: GPT, test_set: TestSet, title: str = "test rows") -> Metrics:
    """The scores of a classifier on the rows, as they are computed after training."""
    values, loss = score(params, test_set.examples, test_set.labels, test_set.max_seq_len)
    counts = {
        "rows": len(test_set.examples),
        "truncated rows": test_set.num_truncated,
        "classes": len(test_set.labels.names),
    }
    shown = {"accuracy": values["accuracy"], "macro-F1": values["macro_f1"], "loss (nats per row)": loss}
    return print_metrics(title, counts, shown)
