"""What is checked once of a state that a training leaves: it, and the loss that it gives, must be finite.

The losses of the log are those before each update, so that nothing in them tells what the last update did.
"""

import math

from fgpt.cli.console import console
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.objectives import has_soft_targets
from fgpt.errors import InputError
from fgpt.train_step import State
from fgpt.tree import leaves


def check_final_state(job: TrainingJob, state: State, name: str = "") -> None:
    """Raises InputError if a trained leaf, or the loss of the first micro-batch, is not finite; a loss far above that
    of a uniform guess is printed, after the name of the training if it has others beside it.
    """
    step = int(state.step)
    remedy = "nothing is saved; begin a new run with a lower --lr, or a longer --warmup-steps"
    broken = [path for path, x in leaves(job.evaluation_params(state)).items() if not x.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 4} more" if len(broken) > 4 else ""
        raise InputError(f"after step {step}, {', '.join(broken[:4])}{more} are not finite: {remedy}")
    _, metrics = job.train_step(state, next(job.batches(0))[:1])
    loss = float(metrics.loss)
    if not math.isfinite(loss):
        raise InputError(f"after step {step}, the loss is {loss}: {remedy}")
    if has_soft_targets(job.recipe):
        return
    if loss > (guess := math.log(job.tokenizer.n_vocab)) + 0.25:  # a fresh model's is within 0.1 of the guess
        console.print(
            f"{name}{': ' * bool(name)}after the last step the loss is {loss:.4g}, above the {guess:.3g} of a uniform "
            "guess: the training diverged; lower --lr or raise --warmup-steps"
        )
