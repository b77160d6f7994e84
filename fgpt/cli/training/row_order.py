"""Which rows each update of a fine-tuning reads."""

import itertools
from collections.abc import Iterator
from functools import cached_property

from fgpt.data import packing
from fgpt.data.prompt_templates import Example
from fgpt.recipes import FineTuningRecipe
from fgpt.rng import fold_in, key

Rows = list[list[Example]]
"""Rows of examples that are packed together."""


class RowOrder:
    """The rows of one update after the other: epoch after epoch in a fresh order, without end.

    They are a function of the seed and of the number of rows in an update, `micro_batch_size` times
    `grad_accumulation_steps`: smaller micro-batches of the same update change its gradient by rounding alone.

    Raises InputError for examples that cannot be trained on.
    """

    def __init__(self, examples: list[Example], recipe: FineTuningRecipe, max_seq_len: int) -> None:
        packing.filter_by_length(examples, max_seq_len)
        self._examples, self._recipe, self._max_seq_len = examples, recipe, max_seq_len

    @cached_property
    def first_epoch(self) -> list[Rows]:
        """Its updates: counted for the number of steps, and then trained on."""
        return self._lay_out(0)

    def updates(self, begin: int = 0) -> Iterator[Rows]:
        """The rows of each update, from update `begin` on; the last one of an epoch has those that are left."""
        for epoch in itertools.count():
            updates = self.first_epoch if epoch == 0 else self._lay_out(epoch)
            yield from updates[begin:]
            begin = max(0, begin - len(updates))

    def num_steps(self) -> int:
        """Updates in the recipe's epochs, or its `steps` if it names them."""
        if self._recipe.steps:
            return self._recipe.steps
        return max(1, round(self._recipe.epochs * len(self.first_epoch)))

    def _lay_out(self, epoch: int) -> list[Rows]:
        rng = fold_in(key(self._recipe.seed), f"epoch {epoch}")
        return packing.lay_out_epoch(self._examples, self._max_seq_len, self._recipe.rows_per_update, rng)
