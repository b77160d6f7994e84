"""Which rows each update of a fine-tuning reads: those of shuffled epochs, or the lots of a private training."""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from fgpt.cli.training.job import RowIndices
from fgpt.data import packing
from fgpt.data.examples import Example, example_lengths
from fgpt.data.mixtures import Mixture
from fgpt.recipes import FineTuningRecipe, InstructionRecipe
from fgpt.rng import fold_in, key
from fgpt.transforms.privacy import sample_lot

Rows = list[list[Example]]
"""The same rows, read."""


class UpdateOrder:
    """The rows of one update after the other, by their indices: epoch after epoch in a fresh order, without end.

    An epoch reads the examples that the mixture draws, by default each one once. The rows are a function of the seed
    and of the number of rows in an update, `micro_batch_size` times `grad_accumulation_steps`: smaller micro-batches of
    the same update change its gradient by rounding alone.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        recipe: FineTuningRecipe,
        max_seq_len: int,
        mixture: Mixture | None = None,
        *,
        packed: bool = True,
    ) -> None:
        self._lengths, self._recipe, self.max_seq_len, self._packed = lengths, recipe, max_seq_len, packed
        self._mixture = mixture or Mixture((len(lengths),), (len(lengths),))

    @cached_property
    def first_epoch(self) -> list[RowIndices]:
        """Its updates: counted for the number of steps, and then trained on."""
        return self.lay_out(0)

    def indices(self, begin: int = 0) -> Iterator[RowIndices]:
        """The rows of each update, from update `begin` on; the last one of an epoch has those that are left."""
        for epoch in itertools.count():
            updates = self.first_epoch if epoch == 0 else self.lay_out(epoch)
            yield from updates[begin:]
            begin = max(0, begin - len(updates))

    @property
    def steps_per_epoch(self) -> float:
        return len(self.first_epoch)

    def num_steps(self) -> int:
        """Updates in the recipe's epochs, or its `steps` if it names them."""
        if self._recipe.steps:
            return self._recipe.steps
        return max(1, round(self._recipe.epochs * self.steps_per_epoch))

    def lay_out(self, epoch: int) -> list[RowIndices]:
        """The updates of an epoch."""
        seed = key(self._recipe.seed)
        rng, drawn = fold_in(seed, f"epoch {epoch}"), self._mixture.draw(fold_in(seed, "mixture"), epoch)
        order = drawn[packing.permutation(len(drawn), fold_in(rng, "examples"))].tolist()
        size = self._recipe.rows_per_update
        return packing.lay_out_rows(order, self._lengths, self.max_seq_len, size, rng=rng, packed=self._packed)


class RowOrder(UpdateOrder):
    """The order of examples that are packed into rows, if the recipe packs them, which it reads.

    Raises InputError for examples that cannot be trained on.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        recipe: FineTuningRecipe,
        max_seq_len: int,
        mixture: Mixture | None = None,
    ) -> None:
        packing.filter_by_length(examples, max_seq_len)
        packed = not isinstance(recipe, InstructionRecipe) or recipe.packing
        super().__init__(example_lengths(examples), recipe, max_seq_len, mixture, packed=packed)
        self._examples = examples

    def read(self, update: RowIndices) -> Rows:
        """The examples of an update's rows."""
        return [[self._examples[i] for i in row] for row in update]

    def first_rows(self, num_rows: int) -> Rows:
        """That many rows of the first update, repeated if it has fewer."""
        return list(itertools.islice(itertools.cycle(self.read(self.first_epoch[0])), num_rows))

    def updates(self, begin: int = 0) -> Iterator[Rows]:
        """The rows of each update, read, from update `begin` on."""
        return map(self.read, self.indices(begin))


class LotOrder:
    """The lots of a private training; the interface is that of `RowOrder`. Each example is a row by itself, and in each
    lot with the same probability, so that a lot has as many as it happens to: on average an update's rows. The longest
    come first, as rows of one micro-batch are filled up to one length.

    Raises InputError for examples that cannot be trained on.
    """

    def __init__(self, examples: Sequence[Example], recipe: FineTuningRecipe, max_seq_len: int) -> None:
        packing.filter_by_length(examples, max_seq_len)
        self.max_seq_len = max_seq_len
        self._examples, self._recipe, self._lengths = examples, recipe, example_lengths(examples)

    @property
    def num_examples(self) -> int:
        return len(self._examples)

    @property
    def sampling_rate(self) -> float:
        """The probability of each example to be in a lot."""
        return self._recipe.rows_per_update / self.num_examples

    @property
    def steps_per_epoch(self) -> float:
        return 1 / self.sampling_rate

    def num_steps(self) -> int:
        """As many as read each example as often as the epochs say, on average; or the recipe's `steps`."""
        return self._recipe.steps or max(1, round(self._recipe.epochs * self.steps_per_epoch))

    def first_rows(self, num_rows: int) -> Rows:
        """That many examples, the first ones, repeated if there are fewer."""
        return [[self._examples[i % self.num_examples]] for i in range(num_rows)]

    def updates(self, begin: int = 0) -> Iterator[Rows]:
        """The lot of each update, from update `begin` on."""
        assert self._recipe.privacy.seed is not None
        rng = fold_in(key(self._recipe.privacy.seed), "lots")
        for update in itertools.count(begin):
            lot = sample_lot(self.num_examples, self.sampling_rate, fold_in(rng, update))
            lot.sort(key=lambda i: -self._lengths[i])
            yield [[self._examples[i]] for i in lot]
