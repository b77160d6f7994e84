"""Batches of preference tuning: pairs, or judged answers, with the log-probabilities of the reference policy."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fgpt.cli.console import show_progress
from fgpt.data import packing
from fgpt.data.examples import Example, example_lengths
from fgpt.model import GPT
from fgpt.objectives.kto import JudgedBatch
from fgpt.objectives.logprobs import sequence_logprobs
from fgpt.objectives.pairs import PairBatch
from fgpt.recipes.preference import PreferenceRecipe
from fgpt.rng import fold_in, key
from fgpt.tree import device, tree_map

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


class PreferenceOrder:
    """The rows of each update: epoch after epoch in a fresh order, those of similar length together; a function of the
    seed.
    """

    def __init__(self, examples: PreferenceExamples, recipe: PreferenceRecipe) -> None:
        self._recipe = recipe
        self._lengths = np.maximum(example_lengths(examples.chosen), example_lengths(examples.rejected))
        self._max_length = int(self._lengths.max())

    def _lay_out(self, epoch: int) -> list[list[int]]:
        rng = fold_in(key(self._recipe.seed), f"epoch {epoch}")
        order = packing.permutation(len(self._lengths), fold_in(rng, "examples"))
        per_update = self._recipe.rows_per_update
        updates = packing.lay_out_rows(order, self._lengths, self._max_length, per_update, rng=rng, packed=False)
        return [[i for row in rows for i in row] for rows in updates]

    def updates(self, begin: int = 0) -> Iterator[list[int]]:
        """The rows of each update, from update `begin` on."""
        per_epoch = len(self._lay_out(0))
        for epoch in itertools.count(begin // per_epoch):
            yield from self._lay_out(epoch)[begin % per_epoch :]
            begin = 0

    def num_steps(self) -> int:
        """Updates in the recipe's epochs, or its `steps` if it names them."""
        if self._recipe.steps:
            return self._recipe.steps
        return max(1, round(self._recipe.epochs * len(self._lay_out(0))))


def batch_of(examples: PreferenceExamples, reference: Reference, indices: Sequence[int]) -> PairBatch | JudgedBatch:
    """The batch of some rows."""
    chosen = [[examples.chosen[i]] for i in indices]
    rejected = [[examples.rejected[i]] for i in indices]
    if examples.labels is None:
        sums = torch.cat([reference.chosen[list(indices)], reference.rejected[list(indices)]])
        return PairBatch(packing.collate(chosen + rejected), sums)
    labels = torch.tensor([examples.labels[i] for i in indices])
    return JudgedBatch(
        packing.collate(chosen),
        labels,
        reference.chosen[list(indices)],
        packing.collate(rejected),
        reference.rejected[list(indices)],
    )


def batches(
    order: PreferenceOrder,
    examples: PreferenceExamples,
    reference: Reference,
    micro_batch_size: int,
    begin: int = 0,
) -> Iterator[list[PairBatch | JudgedBatch]]:
    """The micro-batches of one update after the other, from update `begin` on, without end."""
    for indices in order.updates(begin):
        parts = [indices[i : i + micro_batch_size] for i in range(0, len(indices), micro_batch_size)]
        yield [batch_of(examples, reference, part) for part in parts]
