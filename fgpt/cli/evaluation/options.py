"""Options of `fgpt eval run`."""

from dataclasses import dataclass, field

from fgpt.data.classification_datasets import Columns
from fgpt.ranges import BatchSize, PositiveInt


@dataclass(frozen=True)
class RunEvaluationOptions:
    """How a run is evaluated on rows that it was not trained on."""

    num_generations: PositiveInt | None = None
    """For an instruction-tuned run: also answer N held-out prompts, and score the answers as fgpt compare does."""
    limit: PositiveInt | None = None
    """Only the first N held-out rows, and of each evaluation set."""
    test: str | None = None
    """For a classifier: other rows than its own, from a source as fgpt train's --test takes."""
    columns: Columns = field(default_factory=Columns)
    """Which columns of those rows hold text, second text and label, if they are others than the run's."""
    labels: tuple[str, ...] = ()
    """For a classifier whose labels are words that it generates: other labels than it was trained on, as fgpt train
    takes them. Its base is then scored as well."""
    batch_size: BatchSize = 8
    """Rows in one batch; it changes no result."""
