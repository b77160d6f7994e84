"""The training on pairs or judged answers: each is a row of its own, and not packed."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt
from fgpt.cli.metrics_log import HELDOUT_LOSS
from fgpt.cli.training.build import make_tuning_step, with_graphs
from fgpt.cli.training.job import InitialState, TrainingJob, fingerprint
from fgpt.cli.training.optimizers import make_optimizer, make_schedule
from fgpt.cli.training.preference_batches import PreferenceExamples, Reference, batches, preference_order
from fgpt.errors import InputError
from fgpt.model import GPT
from fgpt.objectives.kto import JudgedBatch
from fgpt.objectives.pairs import PairBatch
from fgpt.optim import Optimizer
from fgpt.recipes import PreferenceRecipe, RewardRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import Step, init_state


def assemble_preference_job(
    recipe: PreferenceRecipe | RewardRecipe,
    base: GPT,
    frozen: GPT,
    *,
    adapters: Adapters,
    examples: PreferenceExamples,
    reference: Reference,
    objective: Callable[[GPT, PairBatch | JudgedBatch], tuple[Tensor, Tensor]],
    tokenizer: Tokenizer,
    heldout: PreferenceExamples,
    heldout_loss: Callable[[GPT], float],
) -> TrainingJob:
    """The training of `adapters` over `frozen`, which is `base` without the leaves that they replace.

    Args:
        reference: the log-probabilities of the examples' answers under the reference policy.
        objective: (Σ loss, number of rows) of adapted params and a batch.
        heldout: the rows of the held-out loss, for the fingerprint.
        heldout_loss: of adapted params.

    Raises InputError if evaluations are requested and no rows are held out.
    """
    if isinstance(recipe.eval_every, int) and not len(heldout):
        raise InputError(f"--eval-every {recipe.eval_every} needs held-out rows, and there are none")
    order = preference_order(examples, recipe)
    steps = order.num_steps()
    schedule = make_schedule(recipe, steps)
    optimizer = make_optimizer(recipe, schedule)

    def step_of(optimizer: Optimizer) -> Step:
        return make_tuning_step(optimizer, objective, neftune_noise_alpha=recipe.neftune_noise_alpha)

    micro_batch_size = recipe.rows_per_update // recipe.grad_accumulation_steps
    rows = [*examples.chosen, *examples.rejected, *heldout.chosen, *heldout.rejected]
    labels = f"{examples.labels} {heldout.labels}"
    width = order.max_seq_len if recipe.cuda_graphs else None
    return TrainingJob(
        recipe=recipe,
        step=with_graphs(recipe, step_of(optimizer)),
        frozen=frozen,
        batches=lambda begin: cast(Any, batches(order, examples, reference, micro_batch_size, begin, width)),
        steps=steps,
        schedule=schedule,
        rng=fold_in(key(recipe.seed), "steps"),
        fingerprint=fingerprint(recipe, base, tokenizer, recipe.base, training_rows=rows, labels=labels),
        initial_state=InitialState(init_state(adapters, optimizer)),
        tokenizer=tokenizer,
        eval_losses={HELDOUT_LOSS: lambda tuned: heldout_loss(adapt(frozen, tuned))} if len(heldout) else {},
        step_for=lambda schedule, weight_decay: step_of(make_optimizer(recipe, schedule, weight_decay)),
        steps_per_epoch=order.steps_per_epoch,
        evaluation_params=lambda state: optimizer.evaluation_params(state.opt_state, state.trainable),
    )
