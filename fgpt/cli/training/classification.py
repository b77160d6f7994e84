"""Training a classifier, from a run to its scores."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from rich.table import Table

from fgpt.adapters import Adapters, adapt, trainable_leaves
from fgpt.cli import run_dir
from fgpt.cli.console import announce, console, show_progress
from fgpt.cli.evaluation.metrics.classes import Scores, majority, plot_confusion, scores
from fgpt.cli.inference.classifiers import frame_of, labels_of, log_probabilities, with_head
from fgpt.cli.metrics_log import plot_loss
from fgpt.cli.training.instruction_tuning import (
    assemble_job,
    build_adapters,
    held_out_of,
    load_base,
    low_rate,
    print_saved,
    sizes,
    train_heldout_split,
)
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.loop import resume_hint, train_loop
from fgpt.data import classification_datasets
from fgpt.data.classification_prompts import LabeledText, Labels, encode, resolve_labels, sample_shots
from fgpt.data.prompt_templates import Example
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.io.files import write_json
from fgpt.model import GPT
from fgpt.recipes.classification import ClassificationRecipe
from fgpt.rng import fold_in, key


def read(run: ClassificationRecipe) -> tuple[list[LabeledText], list[LabeledText]]:
    """Rows to train on, and rows to score: those of `test`; of a hub's dataset its own test split, if it has one; else
    the last of a shuffle by the run's seed.

    Raises InputError where holding out would leave nothing to train on.
    """
    rows = classification_datasets.load_labeled_texts(run.train, "train", _columns(run))
    if (test := _test_of(run)) is not None:
        return rows, classification_datasets.load_labeled_texts(test, "test", _columns(run))
    if run.num_heldout < 1:
        raise InputError(f"--num-heldout {run.num_heldout}: expected 1 or more rows to score, or others with --test")
    return train_heldout_split(rows, held_out_of(rows, run.num_heldout, run.train), run.seed)


def to_score(run: ClassificationRecipe) -> list[LabeledText]:
    """The rows to score alone. Raises InputError as `read` does."""
    test = _test_of(run)
    return read(run)[1] if test is None else classification_datasets.load_labeled_texts(test, "test", _columns(run))


def _test_of(run: ClassificationRecipe) -> str | None:
    """The source of the rows to score, where they are not some of those to train on."""
    return run.test or (run.train if classification_datasets.has_test_split(run.train) else None)


def _columns(run: ClassificationRecipe) -> classification_datasets.Columns | None:
    return None if run.columns == classification_datasets.Columns() else run.columns


def trained_of(run: ClassificationRecipe, params: GPT) -> Adapters:
    """What the run trains: its adapter, the leaves beside it, and a head of classes.

    Raises InputError where a target matches nothing that can be adapted.
    """
    head = trainable_leaves(params, r"head\..*") if run.head == "classifier" else {}
    return build_adapters(run, params) | (trainable_leaves(params, run.tune_also) if run.tune_also else {}) | head


def score(params: GPT, examples: list[Example], labels: Labels, width: int) -> tuple[Scores, float]:
    """Scores, and the mean loss in nats per example."""
    found = log_probabilities(params, examples, labels, width)
    truth = [labels.output_ids.index(x.label) for x in examples if x.label is not None]
    loss = -found[range(len(truth)), truth].mean()
    return scores(truth, found.argmax(-1).tolist(), len(labels.names)), float(loss)


class ScoringSet(NamedTuple):
    """What a run is scored on: rows as the tuned model reads them and, with shots before them, the base."""

    names: tuple[str, ...]
    labels: Labels
    width: int
    commonest: Scores
    """Of telling always the label that the training rows have most often."""
    examples: list[Example]
    shown: list[Example]


def build_job(run: ClassificationRecipe) -> tuple[TrainingJob, ScoringSet]:
    """The training, and what is scored before and after it.

    Everything that bad input can spoil is read here, before anything slow begins. Raises InputError.
    """
    run_dir.resolve_device(run.device)
    if run.num_fewshot and run.head == "classifier":
        raise InputError(
            f"--num-fewshot {run.num_fewshot} want labels as next tokens: --head lm, or leave them out"
        )
    cfg, tokenizer = models.load_config_and_tokenizer(run.base)
    names, train, test = resolve_labels(run.labels, *read(run))
    run = replace(run, labels=run.labels or names)
    train, chosen = (
        train_heldout_split(train, min(run.num_heldout, len(train) // 2), run.seed) if run.eval_every else (train, [])
    )
    labels, around, width = (
        labels_of(run, names, tokenizer),
        frame_of(run, names, tokenizer),
        min(run.max_seq_len, cfg.n_ctx),
    )
    with show_progress("tokenizing"):
        examples, cut = encode(train, labels, around, tokenizer, width)
        asked, cut_too = encode(test, labels, around, tokenizer, width)
        by, _ = encode(chosen, labels, around, tokenizer, width)
    if cut + cut_too:
        console.print(
            f"{cut:,} of {len(train):,} training rows and {cut_too:,} of {len(test):,} to be scored are longer than "
            f"{width} tokens: their texts lose their middle"
        )
    shown: list[Example] = []
    if run.num_fewshot:
        shots = sample_shots(train, names, run.num_fewshot, fold_in(key(run.seed), "shots"))
        shown = encode(test, labels, frame_of(run, names, tokenizer, shots), tokenizer, cfg.n_ctx).examples
    base = with_head(run, load_base(run), names)
    adapters = trained_of(run, base)
    judged = (lambda tuned: score(tuned, by, labels, width)[1]) if by else None
    more = {"test_rows": asked, "rows_with_shots": shown, "heldout_rows": by, "labels": f"{labels} {around}"}
    it = assemble_job(run, base, adapters, examples, width, tokenizer, judged, **more)
    announce(
        run.name,
        sizes(run.base, base, adapters),
        f"{len(train):,} rows of {len(names)} labels ({', '.join(names)}), {it.steps} steps",
        f"{len(test):,} to score",
        *low_rate(run.peak_lr, it.steps, run.num_warmup_steps(it.steps)),
    )
    truth = [names.index(row.label) for row in test]
    plain = majority([names.index(row.label) for row in train], truth, len(names))
    return it, ScoringSet(names, labels, width, plain, asked, shown)


def classify(run: ClassificationRecipe, where: Path | None = None) -> Path:
    """Train, save, score; in a new folder, or in `where`, from its last checkpoint on. Returns the run's folder.

    Raises InputError as `plan` and `fit` do.
    """
    it, asked = build_job(run)
    run = cast(ClassificationRecipe, it.run)

    def scored(params: GPT, examples: list[Example]) -> tuple[Scores, float]:
        return score(params, examples, asked.labels, asked.width)

    with run_dir.open_run_dir(run, it.steps, where) as out:
        table: dict[str, tuple[Scores, float | None]] = {"the commonest label": (asked.commonest, None)}
        if run.head == "lm":
            assert it.initial_state is not None
            base = adapt(it.frozen, it.initial_state.trainable)  # adapters at their start change nothing
            table["base"] = scored(base, asked.examples)
            print_scores("base", *table["base"])
            if asked.shown:
                table[f"base, {run.num_fewshot} shots"] = scored(base, asked.shown)
            del base
        fitted = train_loop(it, out)
        tuned = fitted.state.trainable
        run_dir.save_tuned(out, it.frozen, tuned, run.base)
        plot_loss(out / run_dir.METRICS, out / run_dir.LOSS, run.name, "example")
        print_saved(fitted, out)
        if fitted.interrupted:
            console.print(f"what was trained so far is usable; {resume_hint(out)}")
            raise KeyboardInterrupt
        table["tuned"] = scored(adapt(it.frozen, tuned), asked.examples)
        report(run, asked.names, len(asked.examples), table, out)
    return out


def print_scores(side: str, found: Scores, loss: float) -> None:
    console.print(f"{side}: accuracy {found['accuracy']:.3f}, macro-F1 {found['macro_f1']:.3f}, loss {loss:.3f}")


def report(
    run: ClassificationRecipe,
    names: tuple[str, ...],
    rows: int,
    table: dict[str, tuple[Scores, float | None]],
    out: Path,
) -> None:
    """Write metrics.json and confusion.png, and print the scores of each side."""
    found: dict[str, Any] = {side: {**some, "loss": loss} for side, (some, loss) in table.items()}
    write_json(out / run_dir.SCORES, {"labels": list(names), "rows": rows, "scores": found})
    plot_confusion(table["tuned"][0], names, out / run_dir.CONFUSION, f"{run.name}: {rows:,} rows")
    view = Table(
        "", "accuracy", "macro-F1", "loss", title=f"{rows:,} rows that were not trained on", title_justify="left"
    )
    for side, (some, loss) in table.items():
        said = "" if loss is None else f"{loss:.3f}"
        view.add_row(side, f"{some['accuracy']:.3f}", f"{some['macro_f1']:.3f}", said)
    console.print(view)
    console.print(f"what was taken for what: {out / run_dir.CONFUSION}; all figures: {out / run_dir.SCORES}")
