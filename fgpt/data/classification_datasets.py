"""Labeled texts, or pairs of texts, from the hub by name or from a file or folder."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fgpt.data.classification_prompts import LabeledText
from fgpt.data.hub_datasets import HubDataset
from fgpt.data.records import Record, column_names, column_text, is_missing
from fgpt.data.sources import open_source
from fgpt.data.text_files import open_text, strip_boms
from fgpt.errors import InputError

Split: TypeAlias = Literal["train", "test"]

MISSING_TEXTS = ("", "nan", "<na>")
"""What pandas writes for a missing value."""

INTEGER_AS_FLOAT = re.compile(r"-?(0|[1-9][0-9]{0,17})\.0+")
"""An integer as a column of floats writes it."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns. `text2=None` takes the text alone; a name given must exist."""

    text: str = "text"
    text2: str | None = None
    label: str = "label"


@dataclass(frozen=True)
class ClassificationDataset:
    """A dataset on the hub: its repository, the files of each split, its columns, and the names of its classes."""

    repo: str
    files: Mapping[Split, str]
    columns: Columns
    class_names: tuple[str, ...]


HUB_DATASETS = {
    "emotion": ClassificationDataset(
        "dair-ai/emotion",
        {"train": "split/train-*.parquet", "test": "split/test-*.parquet"},
        Columns(),
        ("sadness", "joy", "love", "anger", "fear", "surprise"),
    ),
    "rte": ClassificationDataset(  # GLUE does not publish the labels of its test split
        "nyu-mll/glue",
        {"train": "rte/train-*.parquet", "test": "rte/validation-*.parquet"},
        Columns("sentence1", "sentence2"),
        ("entailment", "not_entailment"),
    ),
    "davidson": ClassificationDataset(
        "tdavidson/hate_speech_offensive",
        {"train": "data/train-*.parquet"},
        Columns("tweet", label="class"),
        ("hate", "offensive", "neutral"),
    ),
}


def has_test_split(source: str) -> bool:
    """Whether a source is a dataset on the hub with a labeled test split, and not a file or folder of that name."""
    return source in HUB_DATASETS and "test" in HUB_DATASETS[source].files and not Path(source).exists()


def load_labeled_texts(source: str, split: Split = "train", columns: Columns | None = None) -> list[LabeledText]:
    r"""The labeled texts of a source.

    Args:
        source: A name in `HUB_DATASETS`; a .txt file of `text;label` lines; a .json, .jsonl, .csv, .tsv or .parquet
            file, the text formats also compressed (.csv.gz); or a folder in the layout of Hugging Face datasets. A path
            comes before a name.
        split: The split to read of a folder or a dataset on the hub.
        columns: The columns to use; by default the source's own, or text and label.

    Labels are read by `class_name`, the same for all formats.

    Raises:
        InputError: if the source does not exist or cannot be read, or a row has no text or no label.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "train.txt"
    >>> _ = path.write_text("what a day;joy\n")
    >>> [(row.text, row.label) for row in load_labeled_texts(str(path))]
    [('what a day', 'joy')]
    """
    known = HUB_DATASETS.get(source)
    if known is not None and split not in known.files and not Path(source).exists():
        raise InputError(
            f"{source} has no {split} split on the hub: leave `{split}` out, and training rows are held out for it",
            field=split,
        )
    hub_datasets = {
        name: HubDataset(dataset.repo, dataset.files[split])
        for name, dataset in HUB_DATASETS.items()
        if split in dataset.files
    }
    records, from_hub = open_source(source, hub_datasets, split=split, extra_readers={".txt": _read_txt})
    default_columns, class_names = Columns(), ()
    if known and from_hub:
        default_columns, class_names = known.columns, known.class_names
    rows: list[LabeledText] = []
    for number, (where, record) in enumerate(records, 1):
        row = _row(record, columns or default_columns, class_names, f"{source}, {where}")
        rows.append(replace(row, number=number))
    if not rows:
        raise InputError(f"{source}: it holds no rows, expected at least one")
    return rows


def _read_txt(path: Path) -> Iterator[Record]:
    """The records of `text;label` lines. The text may hold semicolons."""
    with open_text(path) as lines:
        for number, line in enumerate(strip_boms(lines), 1):
            if not line.strip():
                continue
            text, semicolon, label = line.rstrip("\r\n").rpartition(";")
            if not semicolon:
                raise InputError(f"{path}, line {number}: no ';': expected text;label")
            yield f"line {number}", {"text": text, "label": label}


def _row(record: Any, columns: Columns, class_names: tuple[str, ...], where: str) -> LabeledText:
    """`class_names` are the names of classes that the source numbers."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object of columns, got {type(record).__name__}")
    for name in (columns.text, columns.label, columns.text2):
        if name is not None and name not in record:
            raise InputError(
                f"{where}: no column {name!r}; there are {column_names(record)}: name the columns to use in "
                "`columns.text`, `columns.text2` and `columns.label`",
                field="columns",
            )
    text = _required_text(record, columns.text, where, column_text)
    label = _required_text(record, columns.label, where, class_name)
    text2 = "" if columns.text2 is None else _required_text(record, columns.text2, where, column_text)
    if class_names and label.isdecimal() and int(label) < len(class_names):
        label = class_names[int(label)]
    return LabeledText(text, text2, label, where)


def _required_text(record: dict[Any, Any], name: str, where: str, convert: Callable[[Any, str, str], str]) -> str:
    """The content of a column, without surrounding white space.

    Raises InputError if it is empty: a row without a label cannot be trained on, and leaving one out of a test set
    would change the score.
    """
    value = record[name]
    content = "" if is_missing(value) else convert(value, name, where).strip()
    if content.lower() in MISSING_TEXTS:
        actual = "is empty" if not content else f"holds {content!r}, which means a missing value"
        raise InputError(f"{where}: column {name!r} {actual}: fix the row, or remove it")
    return content


def class_name(value: Any, name: str, where: str) -> str:
    """The class that a label names, the same in every format: 1, 1.0, "1" and "1.0" are "1", and true is "True", as
    Python and pandas write it in a table.

    Args:
        value: What the column holds.
        name: The column's name, for error messages.
        where: The row's position, for error messages.

    Raises:
        InputError: for a value that is not a label.

    >>> class_name(1.0, "label", "row 1"), class_name("01", "label", "row 1"), class_name(True, "label", "row 1")
    ('1', '01', 'True')
    """
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    label = column_text(value, name, where).strip()
    if INTEGER_AS_FLOAT.fullmatch(label):
        return str(int(label.partition(".")[0]))
    return label
