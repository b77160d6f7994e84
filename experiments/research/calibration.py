"""How well probabilities of a tuned classifier say how often it is right: as trained, by a temperature, by Laplace's
approximation with three forms of the curvature, and by an ensemble of LoRAs.

    fgpt train emotion-smollm2 --train train.txt --test test.txt --name sure
    python -m experiments.research.calibration --run runs/sure --validation val.txt
    python -m experiments.research.calibration               # nano: kinds of questions by their answers; --tiny: less

With evidence, Laplace's approximation needs the training rows alone; a temperature needs other rows with labels, and so
does a prior that is chosen by them. The ensemble is trained here, from other seeds, as one sweep, and only for nano.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import vmap

import fgpt
from fgpt.adapter_types import Adapters
from fgpt.cli.inference.classifiers import label_choices, prompt_frame_of, read_recipe, with_head
from fgpt.cli.run_dir import load_adapters_of
from fgpt.cli.training.build import load_base
from fgpt.cli.training.examples import NANO_TASKS, load_classification_split
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.classification_datasets import load_labeled_texts
from fgpt.data.classification_prompts import LabeledText, encode
from fgpt.evaluation.calibration import expected_calibration_error, find_temperature
from fgpt.transforms.laplace import (
    Curvature,
    diagonal_curvature,
    expected_probs,
    find_prior_precision,
    full_curvature,
    kronecker_curvature,
    logit_posteriors,
)
from fgpt.transforms.last_layer import fit_last_layer
from fgpt.transforms.per_example import chunks_by_width
from fgpt.tree import tree_map

KINDS = ("who", "where", "like", "find", "what", "repeat", "title", "feel")
BATCH_POSITIONS = 1024
"""Positions of the rows that are classified at once."""


class Rows(NamedTuple):
    """Texts, each a batch of one row whose last token has the weight 1, and their classes."""

    texts: list[fgpt.Batch]
    labels: Int[Tensor, " n"]


@dataclass(frozen=True)
class Classifier:
    """A base with a new head, what was trained of it, and rows."""

    base: fgpt.GPT
    trained: Any
    train: Rows
    test: Rows
    validation: Rows | None

    def batch_logits(self, trained: Adapters, batch: fgpt.Batch) -> Float[Tensor, "n classes"]:
        """The logits at the last token of each row."""
        logits = fgpt.apply(fgpt.adapt(self.base, trained), batch.tokens)
        return (batch.weights[..., None] * logits).sum(-2)

    def logits(self, trained: Adapters, row: fgpt.Batch) -> Float[Tensor, " classes"]:
        return self.batch_logits(trained, row)[0]

    def head_logits(self, head: Float[Tensor, "classes d_model"], row: fgpt.Batch) -> Float[Tensor, " classes"]:
        """Those of another head."""
        return self.logits(self.trained | {"head.w": head}, row)

    @torch.no_grad()
    def features(self, rows: Rows) -> Float[Tensor, "n d_model"]:
        """The final hidden state at the last token of each row."""
        params = fgpt.adapt(self.base, self.trained)
        return of_rows(lambda batch: (batch.weights[..., None] * fgpt.hidden(params, batch.tokens)).sum(-2), rows)

    @torch.no_grad()
    def all_logits(self, trained: Adapters, rows: Rows) -> Float[Tensor, "n classes"]:
        return of_rows(lambda batch: self.batch_logits(trained, batch), rows)


def of_rows(fn: Callable[[fgpt.Batch], Float[Tensor, "batch width"]], rows: Rows) -> Float[Tensor, "n width"]:
    """What `fn` gives for each row, in their order."""
    parts = [(indices, fn(batch)) for indices, batch in in_batches(rows)]
    back = torch.tensor([i for indices, _ in parts for i in indices]).argsort()
    return torch.cat([values for _, values in parts])[back]


def in_batches(rows: Rows) -> list[tuple[list[int], fgpt.Batch]]:
    """Rows of about one length, by index and padded."""
    batches: list[tuple[list[int], fgpt.Batch]] = []
    for indices in chunks_by_width([row.tokens.shape[1] for row in rows.texts], BATCH_POSITIONS):
        (stacked,) = fgpt.stack_batches([[rows.texts[i]] for i in indices])
        batches.append((indices, fgpt.Batch(stacked.tokens[:, 0], stacked.targets[:, 0], stacked.weights[:, 0])))
    return batches


# ------------------------------------------------------------------------------------------------------------- methods


class Approximation(NamedTuple):
    """What Laplace's approximation is of: params, their curvature, the logits that they give, and the prior."""

    params: Any
    curvature: Curvature
    logits: Callable[..., Tensor]
    prior_precision: float


def last_layer(classifier: Classifier) -> Approximation:
    """The head alone, fitted anew with the prior of the largest evidence."""
    features = classifier.features(classifier.train)
    layer = fit_last_layer(features, classifier.train.labels, classifier.trained["head.w"])
    return Approximation(layer.head, layer.curvature, classifier.head_logits, layer.prior_precision)


def trained_last_layer(classifier: Classifier) -> Approximation:
    """The head as trained."""
    head = classifier.trained["head.w"]
    curvature = full_curvature(classifier.head_logits, head, classifier.train.texts)
    return Approximation(head, curvature, classifier.head_logits, find_prior_precision(head, curvature))


def kronecker(classifier: Classifier) -> Approximation:
    batches = [batch for _, batch in in_batches(classifier.train)]
    curvature = kronecker_curvature(classifier.batch_logits, classifier.trained, batches, fgpt.key(0))
    precision = find_prior_precision(classifier.trained, curvature)
    return Approximation(classifier.trained, curvature, classifier.logits, precision)


def diagonal(classifier: Classifier) -> Approximation:
    curvature = diagonal_curvature(classifier.logits, classifier.trained, classifier.train.texts)
    precision = find_prior_precision(classifier.trained, curvature)
    return Approximation(classifier.trained, curvature, classifier.logits, precision)


STRUCTURES = {
    "last layer": last_layer,
    "trained last layer": trained_last_layer,
    "Kronecker": kronecker,
    "diagonal": diagonal,
}
GRID = tuple(10.0 ** (k / 4) for k in range(15))
"""Of prior precisions that a validation chooses among."""


def best_on_validation(approximation: Approximation, rows: Rows) -> float:
    """The precision of the grid with the least negative log-likelihood."""
    params, curvature, logits, _ = approximation
    posteriors = logit_posteriors(logits, params, curvature, GRID, rows.texts)
    losses = [negative_log_likelihood(expected_probs(x, fgpt.key(1)), rows.labels) for x in posteriors]
    return GRID[losses.index(min(losses))]


def laplace_probs(
    approximation: Approximation, prior_precisions: Sequence[float], rows: Rows
) -> list[Float[Tensor, "n classes"]]:
    params, curvature, logits, _ = approximation
    posteriors = logit_posteriors(logits, params, curvature, prior_precisions, rows.texts)
    return [expected_probs(posterior, fgpt.key(1)) for posterior in posteriors]


# ----------------------------------------------------------------------------------------------------------- a trained


def load_run(folder: Path, validation: str | None, limit: int | None) -> Classifier:
    """The classifier of `fgpt train`, and its rows."""
    recipe = read_recipe(folder)
    base = with_head(recipe, load_base(recipe), recipe.labels)
    tokenizer = load_tokenizer(recipe).tokenizer
    choices, frame = label_choices(recipe, recipe.labels, tokenizer), prompt_frame_of(recipe, recipe.labels, tokenizer)

    def read(texts: Sequence[LabeledText]) -> Rows:
        examples = encode(texts[:limit], choices, frame, tokenizer, recipe.max_seq_len).examples
        return make_rows([list(x.tokens) for x in examples], [int(x.label or 0) for x in examples])

    train, test = load_classification_split(recipe)
    others = read(load_labeled_texts(validation, "test")) if validation else None
    return Classifier(base, load_adapters_of(folder, base), read(train), read(test), others)


# ----------------------------------------------------------------------------------------------------- nano, trained


def train_on_nano(num_train: int, num_test: int, steps: int, members: int) -> tuple[Classifier, Adapters]:
    """A classifier of the kind of a question by its answer alone, and an ensemble that begins with it: LoRAs and heads
    from several seeds, stacked.
    """
    base, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
    tasks = [json.loads(line) for line in NANO_TASKS.read_text(encoding="utf-8").splitlines()]
    tasks = [task for task in tasks if task["kind"] in KINDS]
    order = torch.randperm(len(tasks), generator=fgpt.key(0)).tolist()
    tokens = [tokenizer.encode(tasks[i]["output"])[:24] for i in order]
    labels = [KINDS.index(tasks[i]["kind"]) for i in order]
    train, test = make_rows(tokens[:num_train], labels[:num_train]), slice(num_train, num_train + num_test)
    others = slice(num_train + num_test, num_train + num_test + num_test // 4)
    with_head = fgpt.with_classification_head(base, len(KINDS), fgpt.key(0))
    fresh: list[Adapters] = []
    for seed in range(members):
        head = fgpt.with_classification_head(base, len(KINDS), fgpt.key(seed))
        fresh.append(fgpt.lora(head, fgpt.key(seed), rank=4) | fgpt.trainable_leaves(head, r"head\..*"))
    classifier = Classifier(
        with_head, fresh[0], train, make_rows(tokens[test], labels[test]), make_rows(tokens[others], labels[others])
    )

    def loss(trained: Adapters, base: fgpt.GPT, row: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        z = classifier.batch_logits(trained, row)
        classes = (row.weights * row.targets).sum(-1).long()
        return torch.nn.functional.cross_entropy(z, classes, reduction="sum"), row.weights.sum()

    optimizer = fgpt.adamw(3e-3)
    step = fgpt.make_step(loss, optimizer)
    states = fgpt.stack_states([fgpt.init_state(x, optimizer) for x in fresh], optimizer)
    for t in range(steps):
        chosen = torch.randint(num_train, (20,), generator=fgpt.fold_in(fgpt.key(1), t)).tolist()
        batch = in_batches(Rows([train.texts[i] for i in chosen], train.labels[chosen]))[0][1]
        states, _ = vmap(lambda state, batch=batch: step(state, with_head, [batch], None))(states)
    first = tree_map(lambda x: x[0], states.trainable)
    return Classifier(with_head, first, train, classifier.test, classifier.validation), states.trainable


def ensemble_probs(classifier: Classifier, members: Adapters) -> Float[Tensor, "n classes"]:
    """The mean of the members' probabilities."""
    return vmap(lambda trained: classifier.all_logits(trained, classifier.test).softmax(-1))(members).mean(0)


def make_rows(texts: Sequence[Sequence[int]], labels: Sequence[int]) -> Rows:
    rows: list[fgpt.Batch] = []
    for tokens, label in zip(texts, labels, strict=True):
        at_the_end = torch.zeros(1, len(tokens))
        at_the_end[0, -1] = 1.0
        rows.append(fgpt.Batch(torch.tensor([list(tokens)]), (label * at_the_end).long(), at_the_end))
    return Rows(rows, torch.tensor(labels))


# ---------------------------------------------------------------------------------------------------------------- main


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """accuracy, nll and ece of each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a classifier that `fgpt train` made")
    parser.add_argument("--validation", help="its rows with labels for the temperature, such as val.txt")
    parser.add_argument("--limit", type=int, help="rows that are read of each of its files, the first")
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES))
    parser.add_argument("--members", type=int, default=5, help="of the ensemble on nano")
    parser.add_argument("--tiny", action="store_true", help="as a test runs it")
    options = parser.parse_args(arguments)
    members: Any = None
    if options.run:
        classifier = load_run(options.run, options.validation, options.limit)
    else:
        sizes = (40, 40, 10) if options.tiny else (120, 300, 60)
        classifier, members = train_on_nano(*sizes, members=options.members)
    logits = classifier.all_logits(classifier.trained, classifier.test)
    scores = {"as trained": score("as trained", logits.softmax(-1), classifier.test.labels)}
    if classifier.validation is not None:
        others = classifier.all_logits(classifier.trained, classifier.validation)
        temperature = find_temperature(others, classifier.validation.labels)
        name = f"temperature {temperature:.2f}"
        scores["temperature"] = score(name, (logits / temperature).softmax(-1), classifier.test.labels)
    if members is not None:
        name = f"ensemble of {options.members}"
        scores["ensemble"] = score(name, ensemble_probs(classifier, members), classifier.test.labels)
    for structure in options.structures:
        begin = time.monotonic()
        approximation = STRUCTURES[structure](classifier)
        precisions = {"evidence": approximation.prior_precision}
        if classifier.validation is not None and structure != "last layer":
            precisions["validation"] = best_on_validation(approximation, classifier.validation)
        all_probs = laplace_probs(approximation, list(precisions.values()), classifier.test)
        seconds = time.monotonic() - begin
        for (chosen_by, precision), probs in zip(precisions.items(), all_probs, strict=True):
            name = f"Laplace, {structure}, prior {precision:.3g} by {chosen_by}, {seconds:.0f} s in all"
            scores[f"{structure} by {chosen_by}"] = score(name, probs, classifier.test.labels)
    return scores


def negative_log_likelihood(probs: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """The mean over the rows."""
    return float(-probs.gather(1, labels[:, None]).clamp(min=1e-30).log().mean())


def score(name: str, probs: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    result = {
        "accuracy": float((probs.argmax(-1) == labels).float().mean()),
        "nll": negative_log_likelihood(probs, labels),
        "ece": float(expected_calibration_error(probs, labels)),
    }
    print(f"{name}: accuracy {result['accuracy']:.4f}, NLL {result['nll']:.3f}, ECE {result['ece']:.4f}", flush=True)
    return result


if __name__ == "__main__":
    main()
