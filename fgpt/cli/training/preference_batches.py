"""Batches of preference tuning: pairs, or judged answers, with the log-probabilities of the reference policy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fgpt.cli.console import show_progress
from fgpt.cli.training.row_order import UpdateOrder
from fgpt.data import packing
from fgpt.data.examples import Example, example_lengths
from fgpt.distributed import map_over_ranks
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.objectives.kto import JudgedBatch
from fgpt.objectives.logprobs import sequence_logprobs
from fgpt.objectives.pairs import PairBatch
from fgpt.recipes import FineTuningRecipe
from fgpt.tree import device, tree_map

R = TypeVar("R")

EVALUATION_ROWS = 8
"""Held-out rows that are scored at a time."""
REFERENCE_ROWS = 16
"""Answers whose reference log-probabilities are computed at a time."""


@dataclass(frozen=True)
class PreferenceExamples:
    """Answers with their prompts as tokens: those chosen and rejected, in the same order, or judged ones."""

    chosen: Sequence[Example]
    """The chosen answers; of judged data every answer."""
    rejected: Sequence[Example]
    """The rejected answers; of judged data each prompt with the answer of another row."""
    labels: tuple[bool, ...] | None = None
    """Of judged data, whether each answer is good."""

    def __len__(self) -> int:
        return len(self.chosen)


@dataclass(frozen=True)
class Reference:
    """The reference policy's log-probability of each answer; zeros if the objective has no reference."""

    chosen: Tensor
    rejected: Tensor


def reference_logprobs(base: GPT, examples: PreferenceExamples) -> Reference:
    """The log-probabilities of all answers under the base, computed once: a function of base and data alone."""
    return Reference(_logprobs(base, examples.chosen), _logprobs(base, examples.rejected))


def no_reference(examples: PreferenceExamples) -> Reference:
    """For objectives without a reference policy."""
    return Reference(torch.zeros(len(examples)), torch.zeros(len(examples)))


def _logprobs(base: GPT, examples: Sequence[Example]) -> Tensor:
    order = np.argsort(example_lengths(examples), kind="stable").tolist()  # rows of one length need no padding
    sums = torch.zeros(len(examples))
    parts = [order[start : start + REFERENCE_ROWS] for start in range(0, len(order), REFERENCE_ROWS)]

    @torch.no_grad()
    def score(indices: Sequence[int]) -> Tensor:
        batch = tree_map(lambda x: x.to(device(base)), packing.collate([[examples[i]] for i in indices]))
        return sequence_logprobs(base, batch).sums.float().cpu()

    with show_progress("reference policy", len(examples)) as advance:
        for indices, part_sums in zip(parts, map_over_ranks(score, parts), strict=True):
            sums[indices] = part_sums
            advance(len(indices))
    return sums


def preference_order(examples: PreferenceExamples, recipe: FineTuningRecipe) -> UpdateOrder:
    """The order of pairs, or of judged answers: each is a row of its own, with those of similar length in an update."""
    lengths = np.maximum(example_lengths(examples.chosen), example_lengths(examples.rejected))
    return UpdateOrder(lengths, recipe, int(lengths.max()), packed=False)


def batch_of(
    examples: PreferenceExamples, reference: Reference, indices: Sequence[int], width: int | None = None
) -> PairBatch | JudgedBatch:
    """The batch of some rows. With a `width`, which they are padded to, its shape follows from their number alone: it
    has no `loss_positions`.
    """

    def collate(rows: list[list[Example]]) -> Batch:
        batch = packing.collate(rows, width)
        return batch if width is None else replace(batch, loss_positions=None)

    chosen = [[examples.chosen[i]] for i in indices]
    rejected = [[examples.rejected[i]] for i in indices]
    if examples.labels is None:
        sums = torch.cat([reference.chosen[list(indices)], reference.rejected[list(indices)]])
        return PairBatch(collate(chosen + rejected), sums)
    labels = torch.tensor([examples.labels[i] for i in indices])
    return JudgedBatch(
        collate(chosen),
        labels,
        reference.chosen[list(indices)],
        collate(rejected),
        reference.rejected[list(indices)],
    )


def map_heldout(
    fn: Callable[[PairBatch | JudgedBatch], R], examples: PreferenceExamples, reference: Reference, target: torch.device
) -> Iterator[R]:
    """fn of all rows, some at a time, on a device; processes share them as `map_over_ranks` does."""
    indices = range(len(examples))

    @torch.no_grad()
    def compute(part: Sequence[int]) -> R:
        return fn(tree_map(lambda x: x.to(target), batch_of(examples, reference, part)))

    return map_over_ranks(compute, [indices[i : i + EVALUATION_ROWS] for i in range(0, len(indices), EVALUATION_ROWS)])


def batches(
    order: UpdateOrder,
    examples: PreferenceExamples,
    reference: Reference,
    micro_batch_size: int,
    begin: int = 0,
    width: int | None = None,
) -> Iterator[list[PairBatch | JudgedBatch]]:
    """The micro-batches of one update after the other, from update `begin` on, without end; see `batch_of`."""
    for rows in order.indices(begin):
        indices = [i for row in rows for i in row]
        parts = [indices[i : i + micro_batch_size] for i in range(0, len(indices), micro_batch_size)]
        yield [batch_of(examples, reference, part, width) for part in parts]
