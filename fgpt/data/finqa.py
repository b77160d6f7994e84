"""FinQA: questions about a page of a financial report, which is text, a table, and more text.

    input = text before, the table with one line per row ("cell | cell"), text after

The answer is a number or a word (yes, no), and most of what it depends on is in the table. So a page that is too long
for the model loses the middle of its texts, and nothing of its table, its question or its answer.

Source: Chen et al. 2021 (FinQA), section 3; the files are those of the paper's repository.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from fgpt.data.prompt_templates import InstructionRow
from fgpt.data.truncation import truncate_middle
from fgpt.errors import InputError

ELLIPSIS = "..."
"""Replaces the removed middle of a text."""
ANSWER_TOKENS = 32
"""Tokens to reserve for an answer that is still to be generated: those of the dataset have fewer."""


@dataclass(frozen=True)
class FinQA(InstructionRow):
    """A question, the page it is about, and its answer. `input` is the three parts of the page, joined."""

    before: str = ""
    table: str = ""
    after: str = ""


def is_finqa(record: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a record is one of FinQA, by its columns, so that any source may contain some."""
    return isinstance(record, dict) and {"pre_text", "post_text", "table"} <= record.keys()


def read_finqa(record: dict[str, Any], where: str) -> FinQA:
    """The row of a FinQA record. Its answer is the annotated one, or if that is empty, the result of the annotated
    program.

    Raises:
        InputError: for a record that lacks a part, or has it in another form; the message begins with `where`.
    """
    texts = [record["pre_text"], record["post_text"]]
    if not all(isinstance(text, list) and all(isinstance(x, str) for x in text) for text in texts):
        raise InputError(f"{where}: expected pre_text and post_text to be lists of sentences: fix the row")
    table_rows = record["table"]
    if not isinstance(table_rows, list) or not all(isinstance(row, list) for row in table_rows):
        raise InputError(f"{where}: expected the table to be a list of rows, each a list of cells: fix the row")
    qa = record.get("qa", record)  # some copies of the dataset have its fields in the record itself
    if not isinstance(qa, dict) or not isinstance(qa.get("question"), str) or not qa["question"].strip():
        raise InputError(f"{where}: expected qa to hold a question: fix the row")
    answers = [str(qa[name]).strip() for name in ("answer", "exe_ans") if qa.get(name) is not None]
    answer = next(filter(None, answers), "")
    before, after = (" ".join(" ".join(text).split()) for text in texts)
    table = "\n".join(map(_table_line, table_rows))
    return _with_page(FinQA(qa["question"], "", answer), before, table, after)


def _table_line(cells: list[Any]) -> str:
    """A row of the table as one line: line breaks in a cell become spaces."""
    return " | ".join(" ".join(str(cell).split()) for cell in cells)


def shorten(
    rows: Sequence[InstructionRow], max_length: int, length: Callable[[InstructionRow], int]
) -> tuple[list[InstructionRow], int]:
    """The rows, and how many of them were shortened to a `length` of at most `max_length`.

    The texts before and after the table of a longer FinQA row lose as many words from their middle as necessary: the
    longer text first, and then both equally. Other rows, and rows whose table alone is too long, are not changed.

    Args:
        rows: The rows.
        max_length: The maximum length, in the unit of `length`.
        length: The length of a row, usually in tokens.
    """
    shortened, count = [], 0
    for row in rows:
        if isinstance(row, FinQA) and length(row) > max_length and length(_keep_words(row, 0)) <= max_length:
            row, count = _keep_words(row, _max_words(row, max_length, length)), count + 1
        shortened.append(row)
    return shortened, count


def _max_words(row: FinQA, max_length: int, length: Callable[[InstructionRow], int]) -> int:
    """The largest number of words of its texts with which a row fits, by bisection."""
    fits, too_many = 0, len(row.before.split()) + len(row.after.split())
    while too_many - fits > 1:
        words = (fits + too_many) // 2
        if length(_keep_words(row, words)) <= max_length:
            fits = words
        else:
            too_many = words
    return fits


def _keep_words(row: FinQA, num_words: int) -> FinQA:
    """The row with `num_words` words of its texts."""
    before, after = row.before.split(), row.after.split()
    shorter = min(len(before), len(after), num_words // 2)
    longer = num_words - shorter
    num_before, num_after = (shorter, longer) if len(before) < len(after) else (longer, shorter)
    return _with_page(row, _truncate(before, num_before), row.table, _truncate(after, num_after))


def _truncate(words: Sequence[str], max_words: int) -> str:
    return " ".join(words if len(words) <= max_words else truncate_middle(words, max_words, [ELLIPSIS]))


def _with_page(row: FinQA, before: str, table: str, after: str) -> FinQA:
    page = "\n".join(part for part in (before, table, after) if part)
    return replace(row, input=page, before=before, table=table, after=after)
