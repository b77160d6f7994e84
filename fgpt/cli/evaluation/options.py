"""Options of `fgpt eval run`."""

from dataclasses import dataclass, field
from pathlib import Path

from fgpt.data.classification_datasets import Columns
from fgpt.generation.beam import LengthPenalty
from fgpt.ranges import BatchSize, NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class RunEvaluationOptions:
    """How a run is evaluated on rows that it was not trained on."""

    num_generations: PositiveInt | None = None
    """For an instruction-tuned run: also answer N held-out prompts, and score the answers as fgpt compare does."""
    limit: PositiveInt | None = None
    """Only the first N held-out rows, and of each evaluation set."""
    test: str | None = None
    """For a classifier or a data-to-text run: other rows than its own, from a source as fgpt train's --test takes."""
    columns: Columns = field(default_factory=Columns)
    """Which columns of those rows hold text, second text and label, if they are others than the run's."""
    labels: tuple[str, ...] = ()
    """For a classifier whose labels are words that it generates: other labels than it was trained on, as fgpt train
    takes them. Its base is then scored as well."""
    num_beams: BatchSize | None = None
    """For a data-to-text run: beams of the search; None takes the run's, as for the next two."""
    length_penalty: LengthPenalty | None = None
    """Divide log-probabilities by the length to this power."""
    no_repeat_ngram: NonNegativeInt | None = None
    """No n-gram of so many tokens twice in a text; 0 allows them."""
    outputs: Path | None = None
    """Write the texts to this file, one a line."""
    batch_size: BatchSize = 8
    """Rows in one batch; it changes no result."""
