"""Examples for instruction tuning, from the hub by name or from a file or folder."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fgpt.data import conversations, finqa
from fgpt.data.conversations import Conversation
from fgpt.data.formats import (
    ASIDE,
    Columns,
    Format,
    Kind,
    Shape,
    check_same,
    meaning_columns,
    missing_column,
    recognize,
    shape_of,
)
from fgpt.data.hub_datasets import HubDataset, hub_records
from fgpt.data.records import column_text, is_missing
from fgpt.data.rows import InstructionRow, TextRow, conversation_row
from fgpt.data.source_syntax import Source, exists, parse_source
from fgpt.data.sources import Located, locate, open_source, open_stream
from fgpt.errors import InputError


@dataclass(frozen=True)
class InstructionDataset(HubDataset):
    """A dataset of instructions or conversations on the hub."""

    columns: Columns = field(default_factory=Columns)


HUB_DATASETS = {
    "alpaca": InstructionDataset("tatsu-lab/alpaca", "data/*.parquet"),
    "dolly": InstructionDataset(
        "databricks/databricks-dolly-15k", "*.jsonl", Columns("instruction", "context", "response")
    ),
    "finqa": InstructionDataset("TableQAKit/FinQA_retrieval", "train.json"),
    "lima": InstructionDataset("GAIR/lima", "train.jsonl"),
    "tulu": InstructionDataset("allenai/tulu-v2-sft-mixture", "data/*.parquet"),
}

HUB_TEXTS = {
    "tinystories": HubDataset("roneneldan/TinyStories", "data/train-00000-of-*.parquet"),
    "wikitext-103": HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1/train-*.parquet"),
    "wikitext-103-valid": HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1/validation-*.parquet"),
}
"""Plain text in the column "text": a row of TinyStories is a document, one of WikiText a line."""


EMPTY_TEXTS = "empty texts"


class Examples(NamedTuple):
    """The examples of a source."""

    rows: list[InstructionRow]
    left_out: Counter[str]
    """What of its rows is not trained on: the number of cases by reason."""
    format: str = ""
    """The format in one line: the source, its columns and its rows."""


def load_rows(
    source: str | Path | Source, columns: Columns | None = None, limit: int | None = None
) -> list[InstructionRow]:
    """The rows of `load_examples`, without the counts of what was left out."""
    return load_examples(source, columns, limit).rows


def load_examples(source: str | Path | Source, columns: Columns | None = None, limit: int | None = None) -> Examples:
    """The first examples of a source, and what of it was left out.

    Args:
        source: A file, a pattern of files, a folder, a name in `HUB_DATASETS` or owner/name of any dataset on the hub,
            with a configuration, revision and split; see `fgpt.data.source_syntax`. The split "train" is read by
            default. A path comes before a name.
        columns: The columns to use; by default the source's own, or the usual ones. The format is recognized by them
            (see `fgpt.data.formats`). A conversation is one example.
        limit: The maximum number of examples; all by default.

    Raises:
        InputError: if a source does not exist or cannot be read, or a row lacks its text.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "data.jsonl"
    >>> _ = path.write_text('{"prompt": "Say hi.", "completion": "Hi."}')
    >>> load_examples(path).rows
    [InstructionRow(instruction='Say hi.', input='', output='Hi.')]
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")
    stream = RowStream(source, columns)
    rows = list(itertools.islice(stream, limit))
    return Examples(rows, +stream.left_out, stream.format)


class LocatedSource(NamedTuple):
    """A source whose files are on this machine."""

    files: Located
    dataset: InstructionDataset | None
    """The one of `HUB_DATASETS` that it is."""


def locate_source(source: str, split: str = "train") -> LocatedSource:
    """The files of a source, of `split` where it names none; what the cache lacks of the hub's is downloaded. Raises
    InputError as `load_examples`.
    """
    return LocatedSource(*locate(source, HUB_DATASETS, split=split))


class RowStream:
    """The rows of a source, read one after the other as they are asked for, and what was found of it so far.

    It is of one use. Args and errors are those of `load_examples`; with `streaming` a dataset on the hub is read over
    the network as its rows are asked for. `located` is what `locate_source` has found of the source, if it was asked.
    """

    def __init__(
        self,
        source: str | Path | Source,
        columns: Columns | None = None,
        *,
        streaming: bool = False,
        located: LocatedSource | None = None,
    ) -> None:
        if located is not None:
            records, dataset = located.files.records(), located.dataset
        else:
            read = open_stream if streaming else open_source
            records, dataset = read(source if isinstance(source, Source) else str(source), HUB_DATASETS)
        self._source, self._records, self._num_records = source, records, 0
        self._reader = RowReader(columns or (dataset.columns if dataset else Columns()), f"{source}, ")
        self.left_out = Counter[str]()
        """What of its rows is not trained on, by reason."""

    @property
    def format(self) -> str:
        """The source's format in one line: its name, its columns and the records that were read."""
        return f"{self._source}: {self._reader.describe(self._num_records)}"

    def __iter__(self) -> Iterator[InstructionRow]:
        is_empty = True
        for where, record in self._records:
            self._num_records += 1
            for row in self._reader(record, where, self.left_out):
                is_empty = False
                yield row
        if is_empty:
            reason = conversations.summary(self.left_out)
            raise InputError(
                f"{self._source}: it holds no rows, expected at least one" + (f"; there are {reason}" if reason else "")
            )


def columns_of(source: str, num_sources: int, columns: Columns | None) -> Columns | None:
    """The columns to use of one of several sources: those on the hub then keep their own."""
    name = parse_source(source).name
    is_on_hub = name in HUB_DATASETS and not exists(name)
    return None if is_on_hub and num_sources > 1 else columns


def load_texts(source: str, limit: int | None = None) -> list[str]:
    """The first `limit` texts (by default all) of a dataset in `HUB_TEXTS`.

    Raises:
        InputError: if the hub cannot be reached.
    """
    records = hub_records(source, HUB_TEXTS[source])
    return [
        column_text(record["text"], "text", f"{source}, {where}") for where, record in itertools.islice(records, limit)
    ]


class RowReader:
    """Reads records into rows. The format is decided by the first record.

    It can be pickled; in another process it goes on with the format that it has.
    """

    def __init__(self, columns: Columns, prefix: str = "") -> None:
        """Rows with these columns; `prefix` is what errors say before the position of a record."""
        self.columns, self.prefix = columns, prefix
        self.format: Format | None = None
        self.standard_names = columns.standard_names()
        self._names: tuple[str, ...] | None = None
        self._shape = Shape(())

    def describe(self, num_records: int) -> str:
        """The format in a few words, with the number of records."""
        return self.format.describe(num_records) if self.format else "no rows"

    def __call__(self, record: Any, where: str, left_out: Counter[str]) -> list[InstructionRow]:
        """The rows of a record.

        Args:
            record: The columns.
            where: The record's position in the source.
            left_out: Counts by reason, to which what is not trained on is added in place.

        Raises:
            InputError: if the record cannot be read, or has another format than the first.
        """
        where = self.prefix + where
        if isinstance(record, list):  # messages without a column name
            record = {"messages": record}
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object of columns, got {type(record).__name__}")
        shape = self._shape_of(record)
        if self.format is None:
            self.format = recognize(record, self.columns, where)
        elif shape.kinds != self.format.kinds or self.format.dialect:
            check_same(record, self.format, self.columns, where)
        if shape.is_plain:
            return [_instruction_row(record, self.columns, where)]
        if shape.kinds == ("finqa",):
            return [finqa.read_finqa(record, where)]
        if shape.kinds == ("meaning",) and (names := meaning_columns(record)):
            return [_instruction_row(record, Columns(instruction=names[0], output=names[1]), where)]
        if self.standard_names:
            named = {usual: record[name] for usual, name in self.standard_names.items()}
            record = {name: record[name] for name in ASIDE if name in record} | named
        if shape.kinds == ("text",):
            return _text_rows(record["text"], where, left_out)
        return _conversation_rows(record, shape.kinds, self.columns, where, left_out)

    def _shape_of(self, record: dict[str, Any]) -> Shape:
        """The shape of a record, which is mostly that of the one before it."""
        names = tuple(record)
        if names != self._names:
            self._names, self._shape = names, shape_of(names, self.columns)
        return self._shape


def _text_rows(value: Any, where: str, left_out: Counter[str]) -> list[InstructionRow]:
    text = "" if is_missing(value) else column_text(value, "text", where)
    left_out[EMPTY_TEXTS] += not text.strip()
    return [TextRow(output=text)] if text.strip() else []


def _conversation_rows(
    record: dict[str, Any], kinds: tuple[Kind, ...], columns: Columns, where: str, left_out: Counter[str]
) -> list[InstructionRow]:
    """The rows of a conversation, or of an instruction, which may have a system prompt and earlier exchanges."""
    has_instruction = "instruction" in kinds
    if kinds != ("instruction",):
        names = (columns.instruction, columns.output)
        is_filled = has_instruction and not all(is_missing(record.get(name)) for name in names)
        conversation = conversations.read_conversation(record, where, is_filled)
        if conversation is not None:
            return _rows_of_conversation(conversation, left_out)
    row = _instruction_row(record, columns, where)
    prompt = f"{row.instruction}\n\n{row.input}" if row.input.strip() else row.instruction
    conversation = conversations.read_history(record, prompt, row.output, where)
    return [row] if conversation is None else _rows_of_conversation(conversation, left_out)


def _instruction_row(record: dict[Any, Any], columns: Columns, where: str) -> InstructionRow:
    for name in (columns.instruction, columns.output, columns.input):
        if name is not None and name not in record:
            raise missing_column(name, record, where)
    input_name = columns.input or "input"
    input_value = record.get(input_name, "")
    return InstructionRow(
        column_text(record[columns.instruction], columns.instruction, where),
        "" if is_missing(input_value) else column_text(input_value, input_name, where),
        column_text(record[columns.output], columns.output, where),
    )


def _rows_of_conversation(conversation: Conversation, left_out: Counter[str]) -> list[InstructionRow]:
    """The row of a conversation, none if nothing of it is trained on; a single question and answer is a plain row."""
    messages = conversations.training_messages(conversation, left_out)
    if not messages:
        return []
    if len(messages) == 2 and messages[0].role == "user" and messages[1].weight == 1:
        return [InstructionRow(messages[0].content, "", messages[1].content)]
    return [conversation_row(messages, conversation.where)]
