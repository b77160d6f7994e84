"""Prompts from a file: a list of texts, or of rows with or without an answer to hold against."""

from pathlib import Path
from typing import Any

from fgpt.data import finqa, records
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError

NAMED = {path.stem: path for path in sorted((Path(__file__).parent / "prompts").glob("*.json"))}
"""Files of prompts that come with the package."""


def read(source: str) -> list[InstructionRow]:
    """The prompts of a file, in its order, or of one that comes with the package ("general").

    The file is a .json list or a .jsonl file of texts, or of objects with an instruction and, if there is one, an input
    and an output, or as FinQA has them; or a .csv, .tsv or .parquet file of such columns. Files of text may be
    compressed (.jsonl.gz). A file of a name comes before the package's own.

    Raises InputError for a file that is not there or cannot be read, that holds no prompts, or an empty one.
    """
    path = Path(source)
    if not path.is_file():
        if source not in NAMED:
            raise InputError(f"no prompt file {source!r}: expected the path of a file, or one of {', '.join(NAMED)}")
        path = NAMED[source]
    found = [_row(record, f"{path}, {where}") for where, record in records.read_records(path)]
    if not found:
        raise InputError(f"{path}: it holds no prompts, expected at least one")
    return found


def _row(record: Any, where: str) -> InstructionRow:
    if isinstance(record, str):
        record = {"instruction": record}
    if finqa.is_finqa(record):
        return finqa.read_finqa(record, where)
    if not isinstance(record, dict) or "instruction" not in record:
        came = f"columns {records.column_names(record)}" if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where}: expected a text, or an object with an instruction, got {came}")
    held = {name: x for name in ("input", "output") if not records.is_missing(x := record.get(name))}
    row = InstructionRow(
        **{
            name: records.column_text(x, name, where)
            for name, x in ({"instruction": record["instruction"]} | held).items()
        }
    )
    if not row.instruction.strip():
        raise InputError(f"{where}: the prompt is empty: say what to write")
    return row
