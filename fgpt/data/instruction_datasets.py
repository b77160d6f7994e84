"""Examples for instruction tuning, from the hub by name or from a file or folder."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fgpt.data import conversations, finqa
from fgpt.data.conversations import Conversation
from fgpt.data.hub_datasets import HubDataset, hub_records
from fgpt.data.prompt_templates import InstructionRow, Turn
from fgpt.data.records import column_names, column_text, is_missing
from fgpt.data.sources import open_source
from fgpt.errors import InputError


@dataclass(frozen=True)
class Columns:
    """The names of the columns. `input=None` takes the column "input" if there is one; a name given must exist."""

    instruction: str = "instruction"
    input: str | None = None
    output: str = "output"


@dataclass(frozen=True)
class InstructionDataset(HubDataset):
    """A dataset of instructions or conversations on the hub."""

    columns: Columns = Columns()


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


class Examples(NamedTuple):
    """The examples of a source."""

    rows: list[InstructionRow]
    left_out: Counter[str]
    """What of its conversations is not trained on: the number of cases by reason."""


def load_rows(source: str | Path, columns: Columns | None = None, limit: int | None = None) -> list[InstructionRow]:
    """The rows of `load_examples`, without the counts of what was left out."""
    return load_examples(source, columns, limit).rows


def load_examples(source: str | Path, columns: Columns | None = None, limit: int | None = None) -> Examples:
    """The first examples of a source, and what of it was left out.

    Args:
        source: A name in `HUB_DATASETS`; a .json (list of objects), .jsonl, .csv, .tsv or .parquet file, the text
            formats also compressed (.jsonl.gz); or a folder in the layout of Hugging Face datasets, of which the split
            "train" is read. A path comes before a name.
        columns: The columns to use; by default the source's own, or instruction, input and output. Records of FinQA
            and conversations (see `fgpt.data.conversations`) are recognized by their columns. Each answer of a
            conversation is an example.
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
    left_out = Counter[str]()
    rows = list(itertools.islice(stream_rows(source, columns, left_out), limit))
    return Examples(rows, +left_out)


def stream_rows(source: str | Path, columns: Columns | None, left_out: Counter[str]) -> Iterator[InstructionRow]:
    """The rows of `load_examples`, one after the other; what is left out is added to `left_out` in place.

    Raises:
        InputError: as `load_examples` does.
    """
    records, dataset = open_source(str(source), HUB_DATASETS)
    columns = columns or (dataset.columns if dataset else Columns())
    is_empty = True
    for where, record in records:
        for row in _rows(record, columns, f"{source}, {where}", left_out):
            is_empty = False
            yield row
    if is_empty:
        reason = conversations.summary(left_out)
        raise InputError(
            f"{source}: it holds no rows, expected at least one" + (f"; there are {reason}" if reason else "")
        )


def columns_of(source: str, sources: Sequence[str], columns: Columns | None) -> Columns | None:
    """The columns to use of one of several sources: those on the hub then keep their own."""
    is_on_hub = source in HUB_DATASETS and not Path(source).exists()
    return None if is_on_hub and len(sources) > 1 else columns


def load_all(sources: Sequence[str], columns: Columns | None = None) -> Examples:
    """The examples of several sources, one after the other. If there are several, those on the hub keep their own
    columns. Raises InputError as `load_examples` does.
    """
    rows, left_out = list[InstructionRow](), Counter[str]()
    for source in sources:
        examples = load_examples(source, columns_of(source, sources, columns))
        rows += examples.rows
        left_out += examples.left_out
    return Examples(rows, left_out)


def load_texts(source: str, limit: int | None = None) -> list[str]:
    """The first `limit` texts (by default all) of a dataset in `HUB_TEXTS`.

    Raises:
        InputError: if the hub cannot be reached.
    """
    records = hub_records(source, HUB_TEXTS[source])
    return [
        column_text(record["text"], "text", f"{source}, {where}") for where, record in itertools.islice(records, limit)
    ]


def _rows(record: Any, columns: Columns, where: str, left_out: Counter[str]) -> list[InstructionRow]:
    """The rows of a record: one, or one for each answer of its conversation."""
    if isinstance(record, list):  # messages without a column name
        record = {"messages": record}
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object of columns, got {type(record).__name__}")
    if finqa.is_finqa(record):
        return [finqa.read_finqa(record, where)]
    has_columns = columns.instruction in record and columns.output in record
    if not (has_columns and columns != Columns()):  # columns that the user names come before a conversation
        is_filled = not all(is_missing(record.get(name)) for name in (columns.instruction, columns.output))
        conversation = conversations.read_conversation(record, where, has_columns and is_filled)
        if conversation is not None:
            return _turns(conversation, left_out)
    row = _instruction_row(record, columns, where)
    prompt = f"{row.instruction}\n\n{row.input}" if row.input.strip() else row.instruction
    conversation = conversations.read_history(record, prompt, row.output, where)
    return [row] if conversation is None else _turns(conversation, left_out)


def _instruction_row(record: dict[Any, Any], columns: Columns, where: str) -> InstructionRow:
    required = [columns.instruction, columns.output] + ([] if columns.input is None else [columns.input])
    for name in required:
        if name not in record:
            raise InputError(
                f"{where}: no column {name!r}; there are {column_names(record)}: name the columns to use in "
                "`columns.instruction`, `columns.input` and `columns.output`",
                field="columns",
            )
    input_name = columns.input or "input"
    input_value = record.get(input_name)
    return InstructionRow(
        column_text(record[columns.instruction], columns.instruction, where),
        "" if is_missing(input_value) else column_text(input_value, input_name, where),
        column_text(record[columns.output], columns.output, where),
    )


def _turns(conversation: Conversation, left_out: Counter[str]) -> list[InstructionRow]:
    """The answers of a conversation as rows; a single question and answer is a plain row."""
    pairs = conversations.answer_pairs(conversation, left_out)
    if len(pairs) == 1:
        (context, answer), *_ = pairs
        if len(context) == 1 and context[0].role == "user" and answer.weight == 1:
            return [InstructionRow(context[0].content, "", answer.content)]
    rows: list[InstructionRow] = []
    for context, answer in pairs:
        *earlier, last = context
        question = last.content if last.role == "user" else conversations.as_text([last])
        history = conversations.as_text(earlier)
        rows.append(Turn(question, history, answer.content, context, answer.weight, conversation.where))
    return rows
