"""The labels of texts by a trained classifier: `fgpt classify`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fgpt.cli import run_dir
from fgpt.cli.console import answers
from fgpt.cli.inference import classifiers
from fgpt.cli.output_options import is_json, print_json
from fgpt.data.classification_prompts import LabeledText
from fgpt.errors import InputError
from fgpt.io.files import read_text

TABLES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tsv")
"""The ends of files whose lines are no texts."""


@dataclass(frozen=True)
class ClassifyOptions:
    """The probability of each label for one text or many, by a trained classifier."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The name of a run, or its folder."""
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT ..")] = ()
    """The texts; of a pair both, with a tab between them."""
    file: Path | None = None
    """Instead of them, a file with one text per line, or - for standard input: prints label, probability, text."""
    labels: tuple[str, ...] = ()
    """Other labels than those it was trained on, if its labels are next tokens."""


def run(options: ClassifyOptions) -> None:
    """Raises InputError for an unknown run, for no text, and for one that does not fit."""
    if bool(options.texts) == (options.file is not None):
        raise InputError('which texts? expected one of fgpt classify RUN "TEXT" .. and fgpt classify RUN --file FILE')
    folder = run_dir.find_finished(options.run)
    recipe = classifiers.read_recipe(folder)
    classifiers.resolve_inference_labels(recipe, options.labels)  # bad input is refused before the model is loaded
    are_pairs = recipe.columns.text2 is not None
    if options.file is not None:
        if options.file.suffix in TABLES:
            raise InputError(
                f"{options.file}: expected a text file with one text per line, and {options.file.suffix} has columns: "
                "write its texts into a .txt file"
            )
        lines = read_text(options.file).removesuffix("\n").split("\n")
        rows = [parse_text(line, are_pairs, f"{options.file}, line {i}") for i, line in enumerate(lines, 1)]
    else:
        rows = [parse_text(text, are_pairs, f"text {i}") for i, text in enumerate(options.texts, 1)]
    predictions = classifiers.predict(classifiers.load_classifier(folder), rows, options.labels)
    if is_json():
        print_json(as_json(options.run, rows, predictions))
        return
    if options.file is None:
        narrow = answers.width < TEXT_WIDTH + sum(3 + max(len(name), 5) for name in predictions.names)
        answers.print((lists if narrow else table)(rows, predictions))
        return
    best = predictions.probabilities.amax(-1).tolist()
    for row, label, probability in zip(rows, predictions.argmax, best, strict=True):
        print(label, f"{probability:.4f}", row.text, *([row.text2] if are_pairs else []), sep="\t")


def as_json(run: str, rows: Sequence[LabeledText], predictions: classifiers.Predictions) -> dict[str, Any]:
    """What --json prints."""
    entries = []
    for row, values, label in zip(rows, predictions.probabilities.tolist(), predictions.argmax, strict=True):
        texts = {"text": row.text} | ({"text2": row.text2} if row.text2 else {})
        entries.append(texts | {"label": label, "probabilities": dict(zip(predictions.names, values, strict=True))})
    return {"run": run, "labels": list(predictions.names), "predictions": entries}


def parse_text(text: str, is_pair: bool, where: str) -> LabeledText:
    """A row without a label. Raises InputError for a pair without a tab."""
    first, tab, second = text.partition("\t") if is_pair else (text, "", "")
    if is_pair and not (tab and second.strip()):
        raise InputError(f"{where}: the run classifies pairs: expected two texts with a tab between them")
    return LabeledText(first.strip(), second.strip(), where=where)


TEXT_WIDTH = 24
"""Columns that a table leaves for the texts; in a narrower terminal each text is a list."""


def lists(rows: Sequence[LabeledText], predictions: classifiers.Predictions) -> Group:
    """Each text, and below it its probabilities, the largest first: for narrow terminals and many labels."""
    lines: list[Text] = []
    for row, probabilities in zip(rows, predictions.probabilities.tolist(), strict=True):
        lines.append(Text(" / ".join(x for x in (row.text, row.text2) if x)))
        by_size = sorted(zip(probabilities, predictions.names, strict=True), reverse=True)
        for i, (probability, name) in enumerate(by_size):
            lines.append(Text(f"  {probability:.3f}  {name}", "" if i else "bold"))
    return Group(*lines)


def table(rows: Sequence[LabeledText], predictions: classifiers.Predictions) -> Table:
    """The probabilities, the largest of each text in bold."""
    view = Table("text", *predictions.names)
    for column in view.columns[1:]:
        column.justify = "right"
    for row, probabilities, label in zip(rows, predictions.probabilities.tolist(), predictions.argmax, strict=True):
        text = " / ".join(x for x in (row.text, row.text2) if x)
        cells = []
        for name, probability in zip(predictions.names, probabilities, strict=True):
            cells.append(Text(f"{probability:.3f}", "bold" if name == label else ""))
        view.add_row(text, *cells)
    return view
