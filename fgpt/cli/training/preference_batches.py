"""Batches of preference tuning: pairs, or judged answers, with the log-probabilities of the reference policy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fgpt.cli.console import show_progress
from fgpt.cli.training.row_order import UpdateOrder
from fgpt.data import packing
from fgpt.data.examples import Example, example_lengths
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.objectives.kto import JudgedBatch
from fgpt.objectives.logprobs import sequence_logprobs
from fgpt.objectives.pairs import PairBatch
from fgpt.recipes import FineTuningRecipe
from fgpt.tree import device, tree_map

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


@torch.no_grad()
def _logprobs(base: GPT, examples: Sequence[Example]) -> Tensor:
    order = np.argsort(example_lengths(examples), kind="stable").tolist()  # rows of one length need no padding
    sums = torch.zeros(len(examples))
    with show_progress("reference policy", len(examples)) as advance:
        for start in range(0, len(order), REFERENCE_ROWS):
            indices = order[start : start + REFERENCE_ROWS]
            batch = tree_map(lambda x: x.to(device(base)), packing.collate([[examples[i]] for i in indices]))
            sums[indices] = sequence_logprobs(base, batch).sums.float().cpu()
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


def heldout_batches(params: GPT, examples: PreferenceExamples, reference: Reference) -> list[PairBatch | JudgedBatch]:
    """All rows, some at a time, on the device of `params`."""
    indices = range(len(examples))
    parts = [indices[i : i + EVALUATION_ROWS] for i in range(0, len(indices), EVALUATION_ROWS)]
    return [tree_map(lambda x: x.to(device(params)), batch_of(examples, reference, part)) for part in parts]


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
