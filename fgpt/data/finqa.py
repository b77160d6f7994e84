"""FinQA: questions about a page of a financial report, which is text, a table, and more text.

    input = text before, the table a line to a row ("cell | cell"), text after

The answer is a number or two words (yes, no), and most of what it takes stands in the table. So a page that is too long
for the model loses the middle of its texts, and nothing of its table, its question or its answer.

Source: Chen et al. 2021 (FinQA), section 3; the files are those of the paper's repository.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from fgpt.data.packing import truncate_middle
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError

GAP = "..."
"""What stands where a text has lost its middle."""
ROOM = 32
"""Tokens to leave for an answer that is yet to be written: the written ones have fewer."""


@dataclass(frozen=True)
class FinQA(InstructionRow):
    """A question, the page it is asked of, and its answer. `input` is the three parts of the page, joined."""

    before: str = ""
    table: str = ""
    after: str = ""


def is_finqa(record: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a record is one of FinQA's: by its names, so that a source of any kind may hold some."""
    return isinstance(record, dict) and {"pre_text", "post_text", "table"} <= record.keys()


def read(record: dict[str, Any], where: str) -> FinQA:
    """The row of a record of FinQA's. Its answer is that which was written down, or, where that is empty, the result of
    the program that computes it.

    Raises InputError for a record that lacks a part, or has it in another form.
    """
    texts = [record["pre_text"], record["post_text"]]
    if not all(isinstance(text, list) and all(isinstance(x, str) for x in text) for text in texts):
        raise InputError(f"{where}: expected pre_text and post_text to be lists of sentences: mend the row")
    lines = record["table"]
    if not isinstance(lines, list) or not all(isinstance(line, list) for line in lines):
        raise InputError(f"{where}: expected the table to be a list of rows, each a list of cells: mend the row")
    asked = record.get("qa", record)  # some copies have it one level up
    if not isinstance(asked, dict) or not isinstance(asked.get("question"), str) or not asked["question"].strip():
        raise InputError(f"{where}: expected qa to hold a question: mend the row")
    answers = (str(asked[name]).strip() for name in ("answer", "exe_ans") if asked.get(name) is not None)
    before, after = (" ".join(" ".join(text).split()) for text in texts)
    # a cell's own line breaks would tear its row apart
    table = "\n".join(" | ".join(" ".join(str(cell).split()) for cell in line) for line in lines)
    return _row(FinQA(asked["question"], "", next(filter(None, answers), "")), before, table, after)


def shorten(
    rows: Sequence[InstructionRow], width: int, length: Callable[[InstructionRow], int]
) -> tuple[list[InstructionRow], int]:
    """The rows, and how many of them were shortened so that their `length` is at most `width`.

    Of a FinQA row that is longer, the texts before and after the table lose as many words of their middle as it takes:
    the longer of the two first, and then both alike. Other rows, and one whose table alone is too long, stay as they
    are.
    """
    found, count = [], 0
    for row in rows:
        if isinstance(row, FinQA) and length(row) > width and length(_kept(row, 0)) <= width:
            fits, more = 0, len(row.before.split()) + len(row.after.split())  # words: as many fit, as many are too many
            while more - fits > 1:
                words = (fits + more) // 2
                fits, more = (words, more) if length(_kept(row, words)) <= width else (fits, words)
            row, count = _kept(row, fits), count + 1
        found.append(row)
    return found, count


def _kept(row: FinQA, words: int) -> FinQA:
    """The row with so many words of its texts."""
    texts = row.before.split(), row.after.split()
    short = min(*map(len, texts), words // 2)
    most = [short, words - short] if len(texts[0]) < len(texts[1]) else [words - short, short]
    before, after = (_cut(text, n) for text, n in zip(texts, most, strict=True))
    return _row(row, before, row.table, after)


def _cut(words: Sequence[str], most: int) -> str:
    return " ".join(words if len(words) <= most else truncate_middle(words, most, [GAP]))


def _row(row: FinQA, before: str, table: str, after: str) -> FinQA:
    page = "\n".join(part for part in (before, table, after) if part)
    return replace(row, input=page, before=before, table=table, after=after)
