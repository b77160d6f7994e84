"""From examples to batches: nothing lost, nothing twice, and no document sees another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from fgpt.data.prompt_templates import Example
from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.rng import fold_in

T = TypeVar("T")

WINDOW = 32
"""Micro-batches' worth of examples that `epoch` sorts by length at a time: little padding, and still a shuffle."""


@dataclass(frozen=True)
class DropCounts:
    """How many rows `fit` left out: longer than the width, and without an answer."""

    long: int
    empty: int


def filter_by_length(examples: Sequence[Example], width: int, drop: bool = False) -> tuple[list[Example], DropCounts]:
    """The examples that can be trained on in rows of `width` tokens, and how many were left out.

    Raises InputError for an example that is too long or has no answer (with `drop` it is left out and counted), and
    when none remains.
    """
    kept: list[Example] = []
    long = empty = 0
    for number, example in enumerate(examples, 1):
        length = len(example.tokens)
        if length > width:
            long += 1
            if not drop:
                raise InputError(
                    f"row {number} has {length} tokens, the limit is {width}: shorten it, raise the limit, or drop "
                    "long rows"
                )
        elif example.label is None and length - example.prompt_length < 2:  # the end of text alone
            empty += 1
            if not drop:
                raise InputError(f"row {number} has no response: give it one, or drop empty rows")
        else:
            kept.append(example)
    if not kept:
        raise InputError(
            f"no row with a response that fits: {len(examples)} rows came, {long} above the limit of {width} tokens "
            f"and {empty} without a response; raise the limit or mend the rows"
        )
    return kept, DropCounts(long, empty)


def truncate_middle(items: Sequence[T], count: int, gap: Sequence[T]) -> list[T]:
    """`count` of the items, as many from their head as from their tail but for one, and `gap` where the middle was."""
    tail = count // 2
    return [*items[: count - tail], *gap, *items[len(items) - tail :]]


def truncate(example: Example, width: int) -> Example:
    """An example of `width` tokens at most: of a long one, prompt and the first part of the answer, whose end the model
    is then not shown. Where the prompt alone leaves no room for an answer, all of it, for `fit` to refuse.
    """
    whole = len(example.tokens) <= width or example.prompt_length > width - 2
    return example if whole else replace(example, tokens=example.tokens[:width])


def collate(rows: Sequence[Sequence[Example]], pad_to: int | None = None) -> Batch:
    """Each row's examples one after the other, padded on the right with token 0 to `pad_to` (default: the longest row).

    A position has its example's weight, which is 1 where nothing else was asked for, where the next token is of the
    same document's answer or end of text, and at the last token of a document that has a label; else 0. Segments are
    1, 2, .. by document and 0 for padding, or None when no row holds more than one document.

    Raises InputError when a row is longer than `pad_to`.
    """
    lengths = [sum(len(example.tokens) for example in row) for row in rows]
    seq = max(lengths) if pad_to is None else pad_to
    for number, length in enumerate(lengths, 1):
        if length > seq:
            raise InputError(f"row {number} of the batch has {length} tokens, the limit is {seq}: shorten it")
    tokens, targets, weights, segments = [], [], [], []
    for row, length in zip(rows, lengths, strict=True):
        padding = [0] * (seq - length)
        tokens.append([token for example in row for token in example.tokens] + padding)
        # A document's last token predicts its label, or nothing: its target is then a filler of weight 0, never the
        # next document's first token.
        targets.append([token for example in row for token in (*example.tokens[1:], example.label or 0)] + padding)
        weights.append([weight for example in row for weight in _weights(example)] + padding)
        segments.append([n for n, example in enumerate(row, 1) for _ in example.tokens] + padding)
    weighted = torch.tensor(weights, dtype=torch.float32)
    return Batch(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        weighted,
        torch.tensor(segments, dtype=torch.int64) if any(len(row) > 1 for row in rows) else None,
        weighted.flatten().nonzero().flatten(),
    )


def _weights(example: Example) -> list[float]:
    """What each position's prediction counts: position i predicts token i + 1."""
    end = len(example.tokens) + (example.label is not None)
    return [example.weight * (example.prompt_length <= i + 1 < end) for i in range(len(example.tokens))]


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """First fit: each item, in the given order, goes into the first bin that still has room for it. O(n log n).

    Returns the bins as lists of indices into `lengths`; none holds more than `width`, and every index is in one bin.

    Raises InputError for an item longer than `width`.
    """
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [width] * (2 * leaves)  # a tree rooted at 1: a leaf is a bin, a parent has its children's larger room
    bins: list[list[int]] = [[] for _ in range(leaves)]
    for index, length in enumerate(lengths):
        if length > width:
            raise InputError(f"row {index + 1} has {length} tokens, the limit is {width}: shorten it")
        at = 1
        while at < leaves:
            at = 2 * at if room[2 * at] >= length else 2 * at + 1
        bins[at - leaves].append(index)
        room[at] -= length
        while at > 1:
            at //= 2
            room[at] = max(room[2 * at], room[2 * at + 1])
    return [indices for indices in bins if indices]


def epoch_batches(
    examples: Sequence[Example], width: int, rows: int, rng: torch.Generator, packed: bool = True
) -> list[list[list[Example]]]:
    """One pass over the examples as micro-batches of at most `rows` rows, each ready for `collate`.

    Packed, a row holds as many examples as fit in `width` tokens. Otherwise it holds one, and a micro-batch is of
    examples of similar length. The order is a function of the key alone: fold the epoch's number into it.

    Raises InputError as `fit` does.
    """
    filter_by_length(examples, width)  # here and not in `pack`, which would name the row by its place in the shuffle
    shuffled = [examples[i] for i in _permutation(len(examples), fold_in(rng, "examples"))]
    if packed:
        bins = pack([len(example.tokens) for example in shuffled], width)
        laid = [[shuffled[i] for i in indices] for indices in bins]
    else:
        windows = (shuffled[i : i + WINDOW * rows] for i in range(0, len(shuffled), WINDOW * rows))
        laid = [[example] for window in windows for example in sorted(window, key=lambda e: len(e.tokens))]
    batches = [laid[i : i + rows] for i in range(0, len(laid), rows)]
    return [batches[i] for i in _permutation(len(batches), fold_in(rng, "batches"))]


def _permutation(n: int, rng: torch.Generator) -> list[int]:
    return torch.randperm(n, generator=rng).tolist()
