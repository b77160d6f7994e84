"""From examples to batches: each example once, and no document attends to another."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fgpt.data.prompt_templates import Example
from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.rng import fold_in

T = TypeVar("T")

SORT_WINDOW = 32
"""Micro-batches whose examples `epoch_batches` sorts by length together: little padding, and still a shuffle."""


@dataclass(frozen=True)
class DropCounts:
    """The number of examples that were left out: longer than the limit, and without an answer."""

    long: int
    empty: int


def filter_by_length(
    examples: Sequence[Example], max_seq_len: int, drop: bool = False
) -> tuple[list[Example], DropCounts]:
    """The examples that can be trained on, and how many were left out.

    Args:
        examples: The examples.
        max_seq_len: The maximum number of tokens of an example.
        drop: Leave out examples that are too long or have no answer, instead of raising.

    Raises:
        InputError: for such an example unless `drop` is set, and if no example remains.
    """
    usable: list[Example] = []
    long = empty = 0
    for number, example in enumerate(examples, 1):
        length = len(example.tokens)
        if length > max_seq_len:
            long += 1
            if not drop:
                raise InputError(
                    f"row {number} has {length} tokens, the limit is {max_seq_len}: shorten it, raise the limit, or "
                    "drop long rows"
                )
        elif example.label is None and length - example.prompt_length < 2:  # an end-of-sequence token alone
            empty += 1
            if not drop:
                raise InputError(f"row {number} has no response: give it one, or drop empty rows")
        else:
            usable.append(example)
    if not usable:
        raise InputError(
            f"no row with a response that fits: {len(examples)} rows came, {long} above the limit of {max_seq_len} "
            f"tokens and {empty} without a response; raise the limit or fix the rows"
        )
    return usable, DropCounts(long, empty)


def truncate_middle(items: Sequence[T], count: int, ellipsis: Sequence[T]) -> list[T]:
    """`count` of the items, half from the beginning and half from the end, with `ellipsis` in place of the middle.

    >>> "".join(truncate_middle("abcdefgh", 5, ".."))
    'abc..gh'
    """
    tail = count // 2
    return [*items[: count - tail], *ellipsis, *items[len(items) - tail :]]


def truncate(example: Example, max_seq_len: int) -> Example:
    """An example of at most `max_seq_len` tokens. A long one keeps its prompt and the beginning of its answer, without
    the end-of-sequence token. If the prompt alone leaves no space for an answer, the example is returned as it is, for
    `filter_by_length` to reject.
    """
    if len(example.tokens) <= max_seq_len or example.prompt_length > max_seq_len - 2:
        return example
    return replace(example, tokens=example.tokens[:max_seq_len])


def collate(rows: Sequence[Sequence[Example]], pad_to: int | None = None) -> Batch:
    """A batch of rows, each the concatenation of its examples, padded on the right with token 0.

    A position has its example's weight (1 by default) if the next token belongs to the same example's answer or its
    end-of-sequence token, and at the last token of an example with a label; else 0. Segments are 1, 2, .. by example
    and 0 for padding, and `cu_seqlens` are their bounds; both are None if no row holds more than one example.

    Args:
        rows: The examples of each row of the batch.
        pad_to: The sequence length; by default that of the longest row.

    Returns:
        The batch, with tokens, targets and weights of shape [rows, sequence length].

    Raises:
        InputError: if a row is longer than `pad_to`.

    >>> batch = collate([[Example((5, 6, 7), prompt_length=1)], [Example((8, 9), prompt_length=1)]])
    >>> batch.tokens.tolist(), batch.weights.tolist()
    ([[5, 6, 7], [8, 9, 0]], [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    """
    lengths = [sum(len(example.tokens) for example in row) for row in rows]
    seq_len = max(lengths) if pad_to is None else pad_to
    for number, length in enumerate(lengths, 1):
        if length > seq_len:
            raise InputError(f"row {number} of the batch has {length} tokens, the limit is {seq_len}: shorten it")
    examples = [example for row in rows for example in row]
    starts = [number * seq_len + start for number, row in enumerate(rows) for start in _bounds(row)[:-1]]
    ids = [number for row in rows for number in range(1, len(row) + 1)]
    counts = torch.tensor([len(example.tokens) for example in examples], dtype=torch.int64)

    def each_token(values: Iterable[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """The value of its example, at each token."""
        return torch.tensor(list(values), dtype=dtype).repeat_interleave(counts)

    def place(values: Tensor) -> Tensor:
        """At the tokens, and 0 elsewhere."""
        return values.new_zeros(len(rows) * seq_len).index_put((positions,), values).view(len(rows), seq_len)

    tokens = torch.from_numpy(np.fromiter(chain.from_iterable(x.tokens for x in examples), np.int64, sum(lengths)))
    offsets = torch.arange(len(tokens)) - (counts.cumsum(0) - counts).repeat_interleave(counts)  # in the example
    positions = each_token(starts) + offsets
    # An example's last token predicts its label, or nothing: its target is then a placeholder of weight 0, never the
    # next example's first token.
    is_last = offsets + 1 == counts.repeat_interleave(counts)
    targets = torch.where(is_last, each_token(example.label or 0 for example in examples), tokens.roll(-1))
    is_answer = offsets + 1 >= each_token(example.prompt_length for example in examples)
    is_answer &= ~is_last | each_token((x.label is not None for x in examples), torch.bool)
    weights = place(each_token((example.weight for example in examples), torch.float32) * is_answer)
    is_packed = any(len(row) > 1 for row in rows)
    return Batch(
        place(tokens),
        place(targets),
        weights,
        place(each_token(ids)) if is_packed else None,
        weights.flatten().nonzero().flatten(),
        _cu_seqlens(rows, seq_len) if is_packed else None,
    )


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
    """First-fit packing: each item, in the given order, goes into the first bin with space for it. O(n log n).

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
    num_leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    space = [capacity] * (2 * num_leaves)  # a tree with root 1: a leaf is a bin, a parent has its children's maximum
    bins: list[list[int]] = [[] for _ in range(num_leaves)]
    for index, length in enumerate(lengths):
        if length > capacity:
            raise InputError(f"row {index + 1} has {length} tokens, the limit is {capacity}: shorten it")
        node = 1
        while node < num_leaves:
            node = 2 * node if space[2 * node] >= length else 2 * node + 1
        bins[node - num_leaves].append(index)
        space[node] -= length
        while node > 1:
            node //= 2
            space[node] = max(space[2 * node], space[2 * node + 1])
    return [indices for indices in bins if indices]


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
    return lay_out_epoch(examples, max_seq_len, micro_batch_size, rng, packed)


def lay_out_epoch(
    examples: Sequence[Example], max_seq_len: int, micro_batch_size: int, rng: torch.Generator, packed: bool = True
) -> list[list[list[Example]]]:
    """`epoch_batches` of examples that `filter_by_length` has let pass."""
    shuffled = [examples[i] for i in _permutation(len(examples), fold_in(rng, "examples"))]
    if packed:
        bins = pack([len(example.tokens) for example in shuffled], max_seq_len)
        rows = [[shuffled[i] for i in indices] for indices in bins]
    else:
        rows = []
        window = SORT_WINDOW * micro_batch_size
        for start in range(0, len(shuffled), window):
            by_length = sorted(shuffled[start : start + window], key=lambda example: len(example.tokens))
            rows += [[example] for example in by_length]
    batches = [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
    return [batches[i] for i in _permutation(len(batches), fold_in(rng, "batches"))]


def _permutation(n: int, rng: torch.Generator) -> list[int]:
    return torch.randperm(n, generator=rng).tolist()
