"""Training on data that is read as training needs it: nothing is downloaded, counted or tokenized beforehand.

The rows of a source are cut into blocks of `shuffle_buffer_size`. A block is laid out as an epoch is: shuffled and
packed by the seed and by its number. After its last row the source is read again. So the rows of an update are a
function of source and seed, and a resumed training reads the source anew up to where it was.
"""

import itertools
from collections import Counter
from collections.abc import Iterator

from fgpt.cli.console import console
from fgpt.cli.training.row_order import RowOrder, Rows
from fgpt.cli.training.row_reports import report_counts, report_left_out, report_parts
from fgpt.data import packing
from fgpt.data.example_store import StoredExamples
from fgpt.data.instruction_datasets import Columns, RowStream
from fgpt.data.rows import InstructionRow
from fgpt.data.tokenization import Encoding, RowChunk, tokenize
from fgpt.errors import InputError
from fgpt.recipes import InstructionRecipe

PASSES, ROWS, PARTS, TRUNCATED, LONG, EMPTY = "passes", "rows", "parts", "truncated", "long", "empty"


class StreamCounts:
    """What was read for training."""

    def __init__(self) -> None:
        self.done = Counter[str]()
        """Passes, rows, and what was done to them."""
        self.left_out = Counter[str]()
        """What of the rows is not trained on, by reason."""


class StreamOrder:
    """The rows of each update, from a source that is streamed; the interface is that of `RowOrder`.

    Args:
        recipe: With one source and a number of steps.
        encoding: How rows become tokens.
        columns: Of the source.

    Raises InputError for a recipe that a stream does not suit, and as `RowStream` does.
    """

    def __init__(self, recipe: InstructionRecipe, encoding: Encoding, columns: Columns | None) -> None:
        _check(recipe)
        self.max_seq_len = encoding.max_seq_len
        self._recipe, self._encoding, self._columns = recipe, encoding, columns
        self._num_heldout = int(recipe.num_heldout)
        self._counts = StreamCounts()
        stream = self._open()
        rows = iter(stream)
        self.heldout: list[InstructionRow] = list(itertools.islice(rows, self._num_heldout))
        """The first rows of the source, which are never trained on."""
        first_rows = list(itertools.islice(rows, recipe.shuffle_buffer_size))
        if not first_rows:
            raise InputError(
                f"{self.source} has {len(self.heldout)} rows, and --num-heldout {self._num_heldout} takes them all: "
                "lower it, or leave out --streaming"
            )
        self._first_counts = StreamCounts()
        self.first_block = self._encode(first_rows, self._first_counts.done)
        """The examples of the first block."""
        self._first_counts.left_out += stream.left_out
        if not len(self.first_block):
            counts = self._first_counts.done
            raise InputError(
                f"no row with a response that fits: of the first {counts[ROWS]} rows of {self.source}, {counts[LONG]} "
                f"are above the limit of {self.max_seq_len} tokens and {counts[EMPTY]} without a response; raise the "
                "limit or fix the rows"
            )
        console.print(f"{stream.format} so far, streamed", markup=False, soft_wrap=True)

    @property
    def source(self) -> str:
        return self._recipe.data[0]

    def num_steps(self) -> int:
        assert self._recipe.steps is not None
        return self._recipe.steps

    def first_rows(self, num_rows: int) -> Rows:
        """As `RowOrder.first_rows`."""
        return RowOrder(self.first_block, self._recipe, self.max_seq_len).first_rows(num_rows)

    def updates(self, begin: int = 0) -> Iterator[Rows]:
        """The rows of each update, from update `begin` on, without end: those before it are read, and laid out."""
        counts = StreamCounts()
        for number, examples in enumerate(self._blocks(counts)):
            if counts.done[ROWS] >= self._counts.done[ROWS]:
                self._counts = counts
            order = RowOrder(examples, self._recipe, self.max_seq_len)
            updates = order.lay_out(number)
            yield from map(order.read, updates[begin:])
            begin = max(0, begin - len(updates))

    def report(self) -> None:
        """Print how much was read, and what of it was not trained on."""
        counts, left_out = self._counts.done, self._counts.left_out
        passes = f", in {counts[PASSES]} passes" if counts[PASSES] > 1 else ""
        console.print(f"streamed {counts[ROWS]:,} rows of {self.source}{passes}", markup=False, soft_wrap=True)
        if counts[TRUNCATED]:
            console.print(f"truncated {counts[TRUNCATED]:,} responses of rows longer than {self.max_seq_len} tokens")
        if counts[LONG] or counts[EMPTY]:
            console.print(
                f"left out {counts[LONG]:,} rows longer than {self.max_seq_len} tokens and {counts[EMPTY]:,} without a "
                "response"
            )
        report_left_out(left_out)
        report_parts(counts[PARTS], self.max_seq_len)
        report_counts(self._recipe, counts, counts[ROWS], self.max_seq_len)

    def _open(self) -> RowStream:
        return RowStream(self.source, self._columns, streaming=True)

    def _blocks(self, counts: StreamCounts) -> Iterator[StoredExamples]:
        """The usable examples of one block after the other, pass after pass."""
        size = self._recipe.shuffle_buffer_size
        counts.done += self._first_counts.done + Counter({PASSES: 1})
        counts.left_out += self._first_counts.left_out
        yield self.first_block
        num_read = self._num_heldout + self._first_counts.done[ROWS]
        left_out_before = Counter[str]()
        while True:
            stream = self._open()
            rows = itertools.islice(stream, num_read, None)
            while block := list(itertools.islice(rows, size)):
                counts.left_out = left_out_before + stream.left_out
                if len(examples := self._encode(block, counts.done)):
                    yield examples
            counts.left_out = left_out_before = left_out_before + stream.left_out
            counts.done[PASSES] += 1
            num_read = self._num_heldout

    def _encode(self, rows: list[InstructionRow], counts: Counter[str]) -> StoredExamples:
        """The examples of rows that can be trained on; what is done to them is counted."""
        tokenized = tokenize(RowChunk(0, rows), self._encoding)
        examples, _ = StoredExamples.from_batches([tokenized.examples]).split_texts(self.max_seq_len)
        counts[PARTS] += len(examples) - tokenized.examples.num_rows
        if self._recipe.overlong == "cut":
            examples, truncated = examples.truncate(self.max_seq_len)
            counts[TRUNCATED] += truncated
        is_long, is_empty = packing.unusable(examples, self.max_seq_len)
        counts.update({ROWS: len(rows), LONG: int(is_long.sum()), EMPTY: int(is_empty.sum())})
        counts.update(tokenized.counts)
        return examples.take((~(is_long | is_empty)).nonzero()[0])


def _check(recipe: InstructionRecipe) -> None:
    if recipe.data == ("nano",):
        raise InputError(
            "--streaming is for data that is too large to read first; the embedded data is not: leave it out"
        )
    if len(recipe.data) != 1:
        raise InputError(f"--streaming reads one source, and --data names {', '.join(recipe.data)}: give one")
    if recipe.forget is not None:
        raise InputError(
            "--forget finds its rows among all others, and --streaming does not read them first: leave one out"
        )
    if recipe.steps is None:
        raise InputError("--streaming does not know how many rows there are: give --steps in place of epochs")
    if recipe.overlong == "error":
        raise InputError(
            "--streaming meets longer rows while it trains: say what to do with them by --overlong drop or cut"
        )
    if 0 < recipe.num_heldout < 1:
        raise InputError(
            f"--num-heldout {recipe.num_heldout:g}: --streaming holds out the first rows: give their number, or 0"
        )
