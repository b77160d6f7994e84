"""Labeled texts, or pairs of them, from the hub by name, or from a file or folder."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fgpt.data import instruction_datasets
from fgpt.data.classification_prompts import LabeledText
from fgpt.data.text_files import open_text, without_marks
from fgpt.errors import InputError

Split: TypeAlias = Literal["train", "test"]


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. `text2=None` takes the text alone; a name given must be there."""

    text: str = "text"
    text2: str | None = None
    label: str = "label"


@dataclass(frozen=True)
class Hub:
    """A dataset on the hub: repository, the files of each split in it, its columns, and what its classes are called."""

    repo: str
    files: Mapping[Split, str]
    columns: Columns
    names: tuple[str, ...]


HUB = {
    "emotion": Hub(
        "dair-ai/emotion",
        {"train": "split/train-*.parquet", "test": "split/test-*.parquet"},
        Columns(),
        ("sadness", "joy", "love", "anger", "fear", "surprise"),
    ),
    "rte": Hub(  # GLUE keeps the labels of its test split to itself
        "nyu-mll/glue",
        {"train": "rte/train-*.parquet", "test": "rte/validation-*.parquet"},
        Columns("sentence1", "sentence2"),
        ("entailment", "not_entailment"),
    ),
    "davidson": Hub(
        "tdavidson/hate_speech_offensive",
        {"train": "data/train-*.parquet"},
        Columns("tweet", label="class"),
        ("hate", "offensive", "neutral"),
    ),
}


def has_test_split(source: str) -> bool:
    """Whether a source is a dataset of the hub, no file or folder of its name, with a test split that has labels."""
    return source in HUB and "test" in HUB[source].files and not Path(source).exists()


def load_labeled_texts(source: str, split: Split = "train", columns: Columns | None = None) -> list[LabeledText]:
    """The labeled rows of a source.

    `source` is a name in `HUB`; a .txt file of `text;label` lines; a .json, .jsonl, .csv, .tsv or .parquet file; or a
    folder in the hub's dataset layout, of which `split` is read. Files of text may be compressed (.csv.gz). A file or
    folder of that name comes before the hub. `columns` defaults to the source's own, or to text and label. What a label
    is, `class_name` says, the same for all formats.

    Raises InputError for a source that is not there or cannot be read, and for a row without a text or a label.
    """
    known = HUB.get(source)
    if known is not None and split not in known.files and not Path(source).exists():
        raise InputError(
            f"{source} has no {split} split on the hub: leave `{split}` out, and training rows are held out for it",
            field=split,
        )
    hubs = {name: instruction_datasets.Hub(it.repo, it.files[split]) for name, it in HUB.items() if split in it.files}
    found, hub = instruction_datasets.open_source(source, hubs, split, {".txt": _semicolons})
    own, names = (known.columns, known.names) if known and hub else (Columns(), ())
    taken = [_row(record, columns or own, names, f"{source}, {where}") for where, record in found]
    if not taken:
        raise InputError(f"{source}: it holds no rows, expected at least one")
    return taken


def _semicolons(path: Path) -> Iterator[instruction_datasets.Record]:
    """`text;label` lines. The text may hold semicolons of its own."""
    with open_text(path) as lines:
        for number, line in enumerate(without_marks(lines), 1):
            if not line.strip():
                continue
            text, semicolon, label = line.rstrip("\r\n").rpartition(";")
            if not semicolon:
                raise InputError(f"{path}, line {number}: no ';': expected text;label")
            yield f"line {number}", {"text": text, "label": label}


def _row(record: Any, columns: Columns, names: tuple[str, ...], where: str) -> LabeledText:
    """`names` says what a class is called where the source counts them."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object of columns, got {type(record).__name__}")
    wanted = [columns.text, columns.label] + ([] if columns.text2 is None else [columns.text2])
    for name in wanted:
        if name not in record:
            raise InputError(
                f"{where}: no column {name!r}; there are {instruction_datasets.listed(record)}: name the columns to "
                "use in `columns.text`, `columns.text2` and `columns.label`",
                field="columns",
            )
    values = [(name, class_name if name == columns.label else instruction_datasets.text) for name in wanted]
    text, label, *more = (_given(record[name], name, where, read) for name, read in values)
    if names and label.isdecimal() and int(label) < len(names):
        label = names[int(label)]
    return LabeledText(text, more[0] if more else "", label, where)


def _given(value: Any, name: str, where: str, read: Callable[[Any, str, str], str]) -> str:
    """What a column holds, without white space about it. Raises InputError where it holds nothing: a row without a
    label has nothing to learn from, and one in a set to be scored would change the score by not being there.
    """
    content = "" if instruction_datasets.is_missing(value) else read(value, name, where).strip()
    if content.lower() in MISSING:
        came = "is empty" if not content else f"holds {content!r}, which stands for nothing"
        raise InputError(f"{where}: column {name!r} {came}: mend the row, or take it out")
    return content


MISSING = ("", "nan", "<na>")
"""What pandas writes for a value that is missing."""


def class_name(value: Any, name: str, where: str) -> str:
    """The class that a label names, alike in every format: 1, 1.0, "1" and "1.0" are "1", and true is "True", as
    Python and pandas write it in a table.

    Raises InputError for what is no label.
    """
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    label = instruction_datasets.text(value, name, where).strip()
    return str(int(label.partition(".")[0])) if WHOLE.fullmatch(label) else label


WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})\.0+")
"""A whole number as a column of floats writes it."""
