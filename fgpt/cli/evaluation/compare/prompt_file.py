"""Prompts from a file: a list of texts, or of rows with or without a reference answer."""

from pathlib import Path
from typing import Any

from fgpt.data import finqa, records
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError

NAMED = {path.stem: path for path in sorted((Path(__file__).parent / "prompts").glob("*.json"))}
"""Files of prompts that come with the package."""


def read(source: str) -> list[InstructionRow]:
    """The prompts of a file, in its order, or of one that comes with the package ("general").

    The file is a .json list or a .jsonl file of texts, or of objects with an instruction and optionally an input and an
    output, or of FinQA's objects; a .csv, .tsv or .parquet file of such columns; or a .txt file of texts separated by
    <|endoftext|>. Text files may be compressed
    (.jsonl.gz). A file of that name takes precedence over the package's own.

    Raises InputError for a file that does not exist or cannot be read, one without prompts, or an empty prompt.
    """
    path = Path(source)
    if not path.is_file():
        if source not in NAMED:
            raise InputError(f"no prompt file {source!r}: expected the path of a file, or one of {', '.join(NAMED)}")
        path = NAMED[source]
    rows = [_row(record, f"{path}, {where}") for where, record in records.read_records(path)]
    if not rows:
        raise InputError(f"{path}: it holds no prompts, expected at least one")
    return rows


def _row(record: Any, where: str) -> InstructionRow:
    if isinstance(record, dict) and record.keys() == {"text"}:  # a document of a text file
        record = record["text"]
    if isinstance(record, str):
        record = {"instruction": record}
    if finqa.is_finqa(record):
        return finqa.read_finqa(record, where)
    if not isinstance(record, dict) or "instruction" not in record:
        came = f"columns {records.column_names(record)}" if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where}: expected a text, or an object with an instruction, got {came}")
    values = {"instruction": record["instruction"]}
    for name in ("input", "output"):
        if not records.is_missing(record.get(name)):
            values[name] = record[name]
    row = InstructionRow(**{name: records.column_text(x, name, where) for name, x in values.items()})
    if not row.instruction.strip():
        raise InputError(f"{where}: the prompt is empty: say what to write")
    return row
