"""The labels of texts by a trained run: `just classify`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.table import Table
from rich.text import Text

from fgpt.cli import run_dir
from fgpt.cli.console import answers
from fgpt.cli.inference import classifiers
from fgpt.data.classification_prompts import LabeledText
from fgpt.errors import InputError
from fgpt.io.files import read_text


@dataclass(frozen=True)
class ClassifyOptions:
    """How likely each label is of a text, or of many, by a trained run that classifies."""

    run: tyro.conf.Positional[str]
    """A run's name, or its folder."""
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """The texts; of a pair both, with a tab between them."""
    file: Path | None = None
    """In place of them a file of a text a line, or - for what is piped in: gives label, probability, text."""
    labels: tuple[str, ...] = ()
    """Other labels than those it was trained on: of a run whose labels are words that it writes."""


def run(asked: ClassifyOptions) -> None:
    """Raises InputError for an unknown run, for no text, and for one that cannot be laid."""
    if bool(asked.texts) == (asked.file is not None):
        raise InputError('which texts? expected one of just classify RUN "TEXT" .. and just classify RUN --file FILE')
    where = run_dir.find_finished(asked.run)
    run = classifiers.read_run(where)
    classifiers.labels_or_own(run, asked.labels)  # before the model is loaded, as all that bad input can spoil
    pairs = run.columns.text2 is not None
    if asked.file is not None:
        lines = read_text(asked.file).removesuffix("\n").split("\n")
        rows = [row(line, pairs, f"{asked.file}, line {i}") for i, line in enumerate(lines, 1)]
    else:
        rows = [row(text, pairs, f"text {i}") for i, text in enumerate(asked.texts, 1)]
    told = classifiers.predict(classifiers.load_classifier(where), rows, asked.labels)
    if asked.file is None:
        show(rows, told)
        return
    for each, label, p in zip(rows, told.argmax, told.probabilities.amax(-1).tolist(), strict=True):
        print(label, f"{p:.4f}", each.text, *([each.text2] if pairs else []), sep="\t")


def row(text: str, pairs: bool, where: str) -> LabeledText:
    """Raises InputError for a pair that is none."""
    first, tab, second = text.partition("\t") if pairs else (text, "", "")
    if pairs and not (tab and second.strip()):
        raise InputError(f"{where}: the run tells pairs: expected two texts with a tab between them")
    return LabeledText(first.strip(), second.strip(), where=where)


def show(rows: Sequence[LabeledText], told: classifiers.Predictions) -> None:
    table = Table("text", *told.names)
    for column in table.columns[1:]:
        column.justify = "right"
    for each, values, label in zip(rows, told.probabilities.tolist(), told.argmax, strict=True):
        text = " / ".join(x for x in (each.text, each.text2) if x)
        cells = (Text(f"{p:.3f}", "bold" if name == label else "") for name, p in zip(told.names, values))
        table.add_row(text, *cells)
    answers.print(table)
