"""Early stopping: a training ends when its held-out loss no longer falls.

How long it has not fallen is computed from the losses of all evaluations so far, which metrics.jsonl has: a resumed
training ends after the same step as one that was not interrupted.

Source: `early_stopping_patience` of transformers' `EarlyStoppingCallback`.
"""

from collections.abc import Sequence

from fgpt.errors import InputError
from fgpt.recipes import TrainingRecipe


def evaluations_since_least(losses: Sequence[float]) -> int:
    """The number of evaluations after the one of least loss; of equal ones the first counts, and NaN is never least.

    >>> evaluations_since_least([3.0, 2.0, 2.5, 2.0])
    2
    """
    least, since = float("inf"), 0
    for loss in losses:
        since += 1
        if loss < least:
            least, since = loss, 0
    return since


def is_exhausted(patience: int | None, losses: Sequence[float]) -> bool:
    """Whether a training with this patience ends after its last evaluation.

    >>> is_exhausted(2, [3.0, 2.0, 2.5]), is_exhausted(2, [3.0, 2.0, 2.5, 2.1])
    (False, True)
    """
    return patience is not None and evaluations_since_least(losses) >= patience


def check_evaluation_options(recipe: TrainingRecipe) -> None:
    """Raises InputError for an option that needs evaluations, without them."""
    if recipe.eval_every:
        return
    if recipe.keep_best:
        raise InputError("--keep-best keeps the state of least held-out loss: give --eval-every N as well")
    if recipe.early_stopping_patience is not None:
        raise InputError(
            f"--early-stopping-patience {recipe.early_stopping_patience} counts evaluations: give --eval-every N as "
            "well"
        )
