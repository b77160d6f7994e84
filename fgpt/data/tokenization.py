"""From rows to batches of the tables of `example_store`. Nothing here imports torch: see `tokenization_worker`."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fgpt.data import finqa
from fgpt.data.example_store import example_batch, row_batch
from fgpt.data.pieces import encode_pieces
from fgpt.data.prompt_templates import Template, batch_pieces, encode
from fgpt.data.rows import InstructionRow, TextRow, last_turns
from fgpt.data.template_markers import count_markers
from fgpt.tokenizers.tokenizer_files import Tokenizer

if TYPE_CHECKING:
    import pyarrow

# What is counted while rows become tokens.
SHORTENED = "pages shortened"
CONTEXT = "answers before the last"
DIVIDED = "conversations divided"
TEXTS = "raw texts"


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens."""

    template: Template
    tokenizer: Tokenizer
    max_seq_len: int
    """Pages of FinQA are shortened to it; other rows keep all their tokens."""
    last_turns: bool = False
    """Of each conversation only the last answer is trained on."""


class RowChunk(NamedTuple):
    """Rows of a source that are tokenized together."""

    first: int
    """The number of the first row in the source, from 0."""
    rows: list[InstructionRow]


class Tokenized(NamedTuple):
    """What is made of a `RowChunk`."""

    examples: "pyarrow.RecordBatch"
    rows: "pyarrow.RecordBatch"
    num_bytes: int
    """Bytes of text."""
    depends_on_length: bool
    """Whether some of it follows from `Encoding.max_seq_len`."""
    counts: Counter[str]
    """What was done, and the markers of templates in prompts."""


def tokenize(chunk: RowChunk, encoding: Encoding) -> Tokenized:
    """Raises InputError for a row that the template or the tokenizer refuses."""
    rows, counts = chunk.rows, count_markers(chunk.rows)
    if encoding.last_turns:
        rows, counts[CONTEXT] = last_turns(rows)
    rows, counts[SHORTENED] = shorten_pages(rows, encoding)
    texts = batch_pieces(rows, encoding.template, encoding.tokenizer)
    counts[DIVIDED] = sum(len(of_row) > 1 for of_row in texts)
    whole = encode_pieces(list(itertools.chain.from_iterable(texts)), encoding.tokenizer)
    counts[TEXTS] = sum(isinstance(row, TextRow) for row in rows)
    return Tokenized(
        example_batch(whole, [number for number, of_row in enumerate(texts, chunk.first) for _ in of_row]),
        row_batch(rows),
        sum(len(piece.text.encode("utf-8", "surrogatepass")) for of_row in texts for each in of_row for piece in each),
        any(isinstance(row, finqa.FinQA) for row in rows),
        +counts,
    )


def shorten_pages(rows: Sequence[InstructionRow], encoding: Encoding) -> tuple[list[InstructionRow], int]:
    """The rows, FinQA's pages without as much of their text as does not fit, and how many those are."""
    if not any(isinstance(row, finqa.FinQA) for row in rows):
        return list(rows), 0

    def length(row: InstructionRow) -> int:
        example = encode(row, encoding.template, encoding.tokenizer)
        return max(len(example.tokens), example.prompt_length + finqa.ANSWER_TOKENS)

    return finqa.shorten(rows, encoding.max_seq_len, length)
