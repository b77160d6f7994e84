"""From rows to batches of the tables of `example_store`. Nothing here imports torch: see `tokenization_worker`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fgpt.data import finqa
from fgpt.data.example_store import example_batch, row_batch
from fgpt.data.pieces import Piece, encode_pieces
from fgpt.data.prompt_templates import InstructionRow, Template, encode, pieces
from fgpt.tokenizers.tokenizer_files import Tokenizer

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens."""

    template: Template
    tokenizer: Tokenizer
    max_seq_len: int
    """Pages of FinQA are shortened to it; other rows keep all their tokens."""


class RowChunk(NamedTuple):
    """Rows of a source that are tokenized together."""

    first: int
    """The number of the first row in the source, from 0."""
    rows: list[InstructionRow]
    groups: list[int]


class Tokenized(NamedTuple):
    """What is made of a `RowChunk`."""

    examples: "pyarrow.RecordBatch"
    rows: "pyarrow.RecordBatch"
    num_bytes: int
    """Bytes of text."""
    num_finqa: int
    """Rows of FinQA, whose text depends on `Encoding.max_seq_len`."""
    num_shortened: int
    """Those of them that were shortened."""


def examples_of_row(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> list[list[Piece]]:
    """The pieces of each example that a row gives."""
    return [pieces(row, template, tokenizer)]


def tokenize(chunk: RowChunk, encoding: Encoding) -> Tokenized:
    """Raises InputError for a row that the template or the tokenizer refuses."""
    rows, num_shortened = shorten_pages(chunk.rows, encoding)
    texts: list[list[Piece]] = []
    numbers: list[int] = []
    for number, row in enumerate(rows, chunk.first):
        examples = examples_of_row(row, encoding.template, encoding.tokenizer)
        texts += examples
        numbers += [number] * len(examples)
    return Tokenized(
        example_batch(encode_pieces(texts, encoding.tokenizer), numbers),
        row_batch(rows, chunk.groups),
        sum(len(piece.text.encode("utf-8", "surrogatepass")) for each in texts for piece in each),
        sum(isinstance(row, finqa.FinQA) for row in rows),
        num_shortened,
    )


def shorten_pages(rows: Sequence[InstructionRow], encoding: Encoding) -> tuple[list[InstructionRow], int]:
    """The rows, FinQA's pages without as much of their text as does not fit, and how many those are."""
    if not any(isinstance(row, finqa.FinQA) for row in rows):
        return list(rows), 0

    def length(row: InstructionRow) -> int:
        example = encode(row, encoding.template, encoding.tokenizer)
        return max(len(example.tokens), example.prompt_length + finqa.ANSWER_TOKENS)

    return finqa.shorten(rows, encoding.max_seq_len, length)
