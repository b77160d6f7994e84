"""Examples and their rows in Arrow's columns: in memory, or mapped from a file, of which only what is used is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from fgpt.data.examples import Example, LazyExamples, Span
from fgpt.data.row_json import row_from_json, row_to_json
from fgpt.data.rows import InstructionRow

if TYPE_CHECKING:
    import pyarrow


def example_schema() -> "pyarrow.Schema":
    """A row of the table is an example: its tokens, its spans, and the number of the row that it was made from."""
    import pyarrow as pa  # imported here because importing fgpt must stay fast

    bounds = pa.list_(pa.int32())
    columns = {"tokens": pa.list_(pa.int32()), "starts": bounds, "ends": bounds, "weights": pa.list_(pa.float64())}
    return pa.schema(columns | {"row": pa.int64()})


def row_schema() -> "pyarrow.Schema":
    """A row as JSON."""
    import pyarrow as pa

    return pa.schema({"json": pa.string()})


def example_batch(examples: Sequence[Example], rows: Sequence[int]) -> "pyarrow.RecordBatch":
    """The examples as a batch of the table.

    Args:
        examples: They have no labels.
        rows: The number of each one's row.
    """
    import pyarrow as pa

    columns: list[Any] = [[example.tokens for example in examples]]
    columns += [[[span[part] for span in example.spans] for example in examples] for part in range(3)]
    schema = example_schema()
    arrays = [pa.array(values, field.type) for values, field in zip([*columns, rows], schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def row_batch(rows: Sequence[InstructionRow]) -> "pyarrow.RecordBatch":
    """The rows as a batch of their table."""
    import pyarrow as pa

    texts: Any = pa.array([row_to_json(row) for row in rows], pa.string())
    return pa.RecordBatch.from_arrays([texts], schema=row_schema())


class StoredRows(Sequence[InstructionRow]):
    """Rows that are read when they are asked for."""

    def __init__(self, batches: Sequence["pyarrow.RecordBatch"]) -> None:
        self._batches = batches
        self._bounds = bounds([batch.num_rows for batch in batches])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @overload
    def __getitem__(self, index: int) -> InstructionRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[InstructionRow]: ...
    def __getitem__(self, index: int | slice) -> InstructionRow | list[InstructionRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        part = int(np.searchsorted(self._bounds, index, "right")) - 1
        return row_from_json(self._batches[part]["json"][index - int(self._bounds[part])].as_py())


@dataclass(frozen=True, eq=False)
class StoredExamples(LazyExamples):
    """Examples whose tokens stay where they are, with what is known of all of them as arrays in memory: 90 bytes for an
    example of one span.
    """

    parts: tuple[np.ndarray, ...]
    """All tokens, int32, in parts."""
    part_bounds: np.ndarray
    """Where each part begins, and the last one ends, counted in tokens."""
    starts: np.ndarray
    """Where each example begins in all tokens."""
    lengths: np.ndarray
    first_spans: np.ndarray
    """Where each example's spans begin in `spans`."""
    num_spans: np.ndarray
    spans: np.ndarray
    """Beginning and end of each span, [spans, 2]."""
    weights: np.ndarray
    """The weight of each span."""
    rows: np.ndarray
    """The number of the row that each example was made from."""

    @classmethod
    def from_batches(cls, batches: Sequence["pyarrow.RecordBatch"]) -> "StoredExamples":
        """The examples of `example_batch`es, one after the other."""
        empty = np.empty(0, np.int64)

        def join_arrays(values: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([empty, *values])

        tokens, starts, ends, weights = (
            [batch[name] for batch in batches] for name in ("tokens", "starts", "ends", "weights")
        )
        parts = tuple(values(column) for column in tokens)
        lengths = join_arrays([np.diff(column.offsets.to_numpy()) for column in tokens])
        num_spans = join_arrays([np.diff(column.offsets.to_numpy()) for column in starts])
        return cls(
            parts,
            bounds([len(part) for part in parts]),
            bounds(lengths)[:-1],
            lengths,
            bounds(num_spans)[:-1],
            num_spans,
            np.stack([join_arrays([values(column) for column in columns]) for columns in (starts, ends)], axis=1),
            join_arrays([values(column) for column in weights]).astype(np.float64),
            join_arrays([batch["row"].to_numpy() for batch in batches]),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredExamples": ...
    def __getitem__(self, index: int | slice) -> "Example | StoredExamples":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        length, first, count = (int(x[index]) for x in (self.lengths, self.first_spans, self.num_spans))
        spans: list[Span] = []
        for number in range(first, first + count):
            start, end = self.spans[number].tolist()
            if start < length:
                spans.append(Span(start, min(end, length), float(self.weights[number])))
        start = int(self.starts[index])
        (tokens,) = self._token_runs(start, start + length) or [np.empty(0, np.int32)]
        return Example(tuple(tokens.tolist()), tuple(spans))

    def take(self, indices: np.ndarray) -> "StoredExamples":
        names = ("starts", "lengths", "first_spans", "num_spans", "rows")
        return replace(self, **{name: getattr(self, name)[indices] for name in names})

    def without_weight(self, indices: np.ndarray) -> "StoredExamples":
        """The same, those at `indices` with weight 0 in every span."""
        counts = self.num_spans[indices]
        numbers = np.repeat(self.first_spans[indices] - bounds(counts)[:-1], counts) + np.arange(counts.sum())
        first_spans = self.first_spans.copy()
        first_spans[indices] = len(self.spans) + bounds(counts)[:-1]  # copies, as parts of a text share their span
        return replace(
            self,
            first_spans=first_spans,
            spans=np.concatenate([self.spans, self.spans[numbers]]),
            weights=np.concatenate([self.weights, np.zeros(len(numbers))]),
        )

    def truncate(self, max_seq_len: int) -> "tuple[StoredExamples, int]":
        """Each as `examples.truncate` leaves it, and how many are shorter for it."""
        prompt_lengths = self.lengths.copy()
        has_spans = self.num_spans > 0
        prompt_lengths[has_spans] = self.spans[self.first_spans[has_spans], 0]
        too_long = (self.lengths > max_seq_len) & (prompt_lengths <= max_seq_len - 2)
        lengths = np.where(too_long, max_seq_len, self.lengths)
        return replace(self, lengths=lengths), int(too_long.sum())

    def split_texts(self, max_seq_len: int) -> "tuple[StoredExamples, np.ndarray]":
        """Raw texts as `examples.split_text` leaves them, and the example that each part is of, ascending. No token is
        copied.
        """
        is_text = (self.num_spans == 1) & (self.lengths > max_seq_len)
        whole = self.spans[self.first_spans[is_text]]
        is_text[is_text] = (whole[:, 0] == 0) & (whole[:, 1] == self.lengths[is_text])
        if max_seq_len < 2 or not is_text.any():
            return self, np.arange(len(self))
        stride = max_seq_len - 1  # a part begins with the last token of the part before it
        num_parts = np.where(is_text, -(-(self.lengths - 1) // stride), 1)
        owners = np.repeat(np.arange(len(self)), num_parts)
        offsets = (np.arange(len(owners)) - bounds(num_parts)[:-1][owners]) * stride
        parts = self.take(owners)
        lengths = np.where(is_text[owners], np.minimum(parts.lengths - offsets, max_seq_len), parts.lengths)
        return replace(parts, starts=parts.starts + offsets, lengths=lengths), owners

    @property
    def with_answer(self) -> np.ndarray:
        counts, spans, _ = self._spans()
        totals = bounds(spans[:, 1] - spans[:, 0])
        ends = counts.cumsum()
        return totals[ends] - totals[ends - counts] > 1

    @property
    def num_loss_tokens(self) -> int:
        _, spans, _ = self._spans()
        predicted = np.maximum(spans, 1)
        return int((predicted[:, 1] - predicted[:, 0]).sum())

    def arrays(self) -> Iterator[np.ndarray]:
        counts, spans, weights = self._spans()
        yield from (self.lengths, np.full(len(self), -1), counts, spans, weights)
        if not len(self):
            return
        # Examples that lie one behind the other are one run.
        ends = self.starts + self.lengths
        breaks = np.flatnonzero(self.starts[1:] != ends[:-1]) + 1
        for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(self)], strict=True):
            yield from self._token_runs(int(self.starts[first]), int(ends[last - 1]))

    def _spans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How many spans each example has, and all of them with their weights: none is beyond a length."""
        counts = self.num_spans
        ends = counts.cumsum()
        numbers = np.repeat(self.first_spans - ends + counts, counts) + np.arange(counts.sum())
        owners = np.repeat(np.arange(len(self)), counts)
        spans, limits = self.spans[numbers], self.lengths[owners]
        is_kept = spans[:, 0] < limits
        clipped = np.minimum(spans[is_kept], limits[is_kept, None])
        return np.bincount(owners[is_kept], minlength=len(self)), clipped, self.weights[numbers][is_kept]

    def _token_runs(self, start: int, end: int) -> list[np.ndarray]:
        """Tokens `start` to `end` of all, in as many pieces as they lie in parts."""
        runs: list[np.ndarray] = []
        part = int(np.searchsorted(self.part_bounds, start, "right")) - 1
        while start < end:
            stop = min(end, int(self.part_bounds[part + 1]))
            if start < stop:
                offset = int(self.part_bounds[part])
                runs.append(self.parts[part][start - offset : stop - offset])
            start, part = stop, part + 1
        return runs


def bounds(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each of several stretches begins that lie one behind the other, and the last one ends, int64.

    >>> bounds([2, 3]).tolist()
    [0, 2, 5]
    """
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])


def values(column: Any) -> np.ndarray:
    """All items of a column of lists, one after the other, where they lie."""
    return column.values.to_numpy()
