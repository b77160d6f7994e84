"""From examples to batches: each example once, and no document attends to another."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fgpt.data.examples import Example, example_lengths, take, with_answer
from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.rng import fold_in

SORT_WINDOW = 32
"""Micro-batches whose examples `epoch_batches` sorts by length together: little padding, and still a shuffle."""


@dataclass(frozen=True)
class DropCounts:
    """The number of examples that were left out: longer than the limit, and without an answer."""

    long: int
    empty: int


def filter_by_length(
    examples: Sequence[Example], max_seq_len: int, drop: bool = False
) -> tuple[Sequence[Example], DropCounts]:
    """The examples at `usable_indices`, and how many were left out. Raises InputError as it does."""
    indices, dropped = usable_indices(examples, max_seq_len, drop)
    return take(examples, indices), dropped


def unusable(examples: Sequence[Example], max_seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each example, whether it is longer than the limit, and whether it is not and has no answer."""
    is_long = example_lengths(examples) > max_seq_len
    return is_long, ~is_long & ~with_answer(examples)


def usable_indices(
    examples: Sequence[Example],
    max_seq_len: int,
    drop: bool = False,
    place: Callable[[int], str] = lambda index: f"row {index + 1}",
) -> tuple[np.ndarray, DropCounts]:
    """The indices of the examples that can be trained on, and how many were left out.

    Args:
        examples: The examples.
        max_seq_len: The maximum number of tokens of an example.
        drop: Leave out examples that are too long or have no answer, instead of raising.
        place: What an error calls the example of an index.

    Raises:
        InputError: for such an example unless `drop` is set, and if no example remains.
    """
    is_long, is_empty = unusable(examples, max_seq_len)
    is_unusable = is_long | is_empty
    if not drop and is_unusable.any():
        first = int(is_unusable.argmax())
        if is_empty[first]:
            raise InputError(f"{place(first)} has no response: give it one, or drop empty rows")
        raise InputError(
            f"{place(first)} has {example_lengths(examples)[first]} tokens, the limit is {max_seq_len}: shorten it, "
            "raise the limit, or drop long rows"
        )
    dropped = DropCounts(int(is_long.sum()), int(is_empty.sum()))
    if is_unusable.all():
        raise InputError(
            f"no row with a response that fits: {len(examples)} rows came, {dropped.long} above the limit of "
            f"{max_seq_len} tokens and {dropped.empty} without a response; raise the limit or fix the rows"
        )
    return np.flatnonzero(~is_unusable), dropped


def collate(rows: Sequence[Sequence[Example]], pad_to: int | None = None) -> Batch:
    """A batch of rows, each the concatenation of its examples, padded on the right with token 0.

    A position has the weight of the span that the example's next token is in, else 0. So has the last token of an
    example with a label; of any other, it predicts nothing. Segments are 1, 2, .. by example and 0 for padding, and
    `cu_seqlens` are their bounds; both are None if no row holds more than one example.

    Args:
        rows: The examples of each row of the batch.
        pad_to: The sequence length; by default that of the longest row.

    Returns:
        The batch, with tokens, targets and weights of shape [rows, sequence length].

    Raises:
        InputError: if a row is longer than `pad_to`.

    >>> batch = collate([[Example.completion((5, 6, 7), 1)], [Example.completion((8, 9), 1)]])
    >>> batch.tokens.tolist(), batch.weights.tolist()
    ([[5, 6, 7], [8, 9, 0]], [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    """
    lengths = [sum(len(example.tokens) for example in row) for row in rows]
    seq_len = max(lengths) if pad_to is None else pad_to
    for number, length in enumerate(lengths, 1):
        if length > seq_len:
            raise InputError(f"row {number} of the batch has {length} tokens, the limit is {seq_len}: shorten it")
    examples = [example for row in rows for example in row]
    starts = np.array([number * seq_len + start for number, row in enumerate(rows) for start in _bounds(row)[:-1]])
    counts = example_lengths(examples)
    positions = _ranges(starts, counts)
    flat_tokens = np.concatenate([np.asarray(example.tokens, dtype=np.int64) for example in examples])
    tokens = np.zeros(len(rows) * seq_len, np.int64)
    tokens[positions] = flat_tokens
    # The target of an example's last token is its label, or a placeholder of weight 0: never the next example's token.
    targets = np.zeros_like(tokens)
    targets[positions] = np.roll(flat_tokens, -1)
    targets[starts + counts - 1] = [example.label or 0 for example in examples]
    # No position predicts the first token of an example.
    spans: list[tuple[int, int, float]] = []
    for start, example in zip(starts, examples, strict=True):
        for begin, end, weight in example.spans:
            spans.append((start + max(1, begin) - 1, max(1, end) - max(1, begin), weight))
    weights = np.zeros(len(tokens), np.float32)
    if spans:
        begins, span_lengths, span_weights = map(np.array, zip(*spans, strict=True))
        weights[_ranges(begins, span_lengths)] = np.repeat(span_weights, span_lengths)
    is_packed = any(len(row) > 1 for row in rows)
    segments = np.zeros_like(tokens)
    segments[positions] = np.repeat([number for row in rows for number in range(1, len(row) + 1)], counts)

    def in_rows(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).view(len(rows), seq_len)

    return Batch(
        in_rows(tokens),
        in_rows(targets),
        in_rows(weights),
        in_rows(segments) if is_packed else None,
        torch.from_numpy(weights.nonzero()[0]),
        _cu_seqlens(rows, seq_len) if is_packed else None,
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers start, start + 1, .. of each range, one range after the other."""
    ends = lengths.cumsum()
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def _bounds(row: Sequence[Example]) -> list[int]:
    """Where each example of a row begins, and the last one ends."""
    return list(accumulate((len(example.tokens) for example in row), initial=0))


def _cu_seqlens(rows: Sequence[Sequence[Example]], seq_len: int) -> Int[Tensor, "rows documents"]:
    """`Batch.cu_seqlens`. Its length is the same for most batches: room for documents of 32 tokens, or for a power of 2
    of them, as compiled programs are made for one shape.
    """
    needed = max(len(row) for row in rows) + 1  # one is padding
    room = max(seq_len // 32, 1 << (needed - 1).bit_length())
    bounds = [[*ends, *[seq_len] * (room + 1 - len(ends))] for ends in map(_bounds, rows)]
    return torch.tensor(bounds, dtype=torch.int32)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit packing: each item, in the given order, goes into the first bin with space for it. O(n sqrt(capacity)).

    Args:
        lengths: The length of each item, in tokens.
        capacity: The maximum total length of a bin.

    Returns:
        The bins as lists of indices into `lengths`; every index is in exactly one bin.

    Raises:
        InputError: for an item longer than `capacity`.

    >>> pack([3, 4, 2, 1], capacity=5)
    [[0, 2], [1, 3]]
    """
    # Of the bins with one and the same space only the first can be the next one to fill. The least of these firsts over
    # all spaces from `length` on is found in two steps: in the rest of the group of `length`, and among whole groups.
    if lengths and max(lengths) > capacity:
        index, length = next((i, x) for i, x in enumerate(lengths) if x > capacity)
        raise InputError(f"row {index + 1} has {length} tokens, the limit is {capacity}: shorten it")
    width = math.isqrt(capacity + 1)
    num_groups, none = capacity // width + 1, len(lengths)
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # heaps of bins
    first, first_of_group = [none] * (num_groups * width), [none] * num_groups
    bins: list[list[int]] = []
    space: list[int] = []
    for index, length in enumerate(lengths):
        group = length // width
        number = min(first[length : (group + 1) * width] + first_of_group[group + 1 :])
        if number == none:
            number, left = len(bins), capacity - length
            bins.append([index])
            space.append(left)
        else:
            bins[number].append(index)
            before = space[number]
            same = with_space[before]
            heappop(same)
            first[before] = same[0] if same else none
            group = before // width
            if first_of_group[group] == number:
                first_of_group[group] = min(first[group * width : (group + 1) * width])
            space[number] = left = before - length
        heappush(with_space[left], number)
        if number < first[left]:
            first[left] = number
            first_of_group[left // width] = min(number, first_of_group[left // width])
    return bins


def epoch_batches(
    examples: Sequence[Example], max_seq_len: int, micro_batch_size: int, rng: torch.Generator, packed: bool = True
) -> list[list[list[Example]]]:
    """One pass over the examples as micro-batches of rows, each ready for `collate`.

    The order is a function of the key alone: fold the number of the epoch into it.

    Args:
        examples: The examples.
        max_seq_len: The maximum number of tokens of a row.
        micro_batch_size: The maximum number of rows of a micro-batch.
        rng: The key of the shuffle.
        packed: Put as many examples into a row as fit; otherwise a row is one example, and a micro-batch holds examples
            of similar length.

    Raises:
        InputError: as `filter_by_length` does.
    """
    filter_by_length(examples, max_seq_len)  # and not in `pack`, whose row numbers would be those of the shuffle
    shuffled = permutation(len(examples), fold_in(rng, "examples"))
    batches = lay_out_rows(shuffled, example_lengths(examples), max_seq_len, micro_batch_size, rng=rng, packed=packed)
    return [[[examples[i] for i in row] for row in batch] for batch in batches]


def lay_out_rows(
    order: Sequence[int],
    lengths: np.ndarray,
    max_seq_len: int,
    micro_batch_size: int,
    *,
    rng: torch.Generator,
    packed: bool = True,
) -> list[list[list[int]]]:
    """The micro-batches of an epoch, each a list of rows, which are lists of indices of examples.

    Args:
        order: The indices of the epoch's examples, shuffled; one may occur several times.
        lengths: The number of tokens of every example.
        max_seq_len: The maximum number of tokens of a row; no example is longer.
        micro_batch_size: The maximum number of rows of a micro-batch.
        rng: The key of the order of the micro-batches.
        packed: As for `epoch_batches`.

    >>> lay_out_rows([2, 0, 1], np.array([3, 1, 2]), 4, 1, rng=torch.Generator().manual_seed(0))
    [[[2, 1]], [[0]]]
    """
    in_order = lengths[order].tolist()
    if packed:
        rows = [[order[i] for i in indices] for indices in pack(in_order, max_seq_len)]
    else:
        rows = []
        window = SORT_WINDOW * micro_batch_size
        for start in range(0, len(order), window):
            by_length = sorted(range(start, min(start + window, len(order))), key=in_order.__getitem__)
            rows += [[order[i]] for i in by_length]
    batches = [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
    return [batches[i] for i in permutation(len(batches), fold_in(rng, "batches"))]


def permutation(n: int, rng: torch.Generator) -> list[int]:
    """A random order of 0, 1, .., n - 1."""
    return torch.randperm(n, generator=rng).tolist()
