"""How an answer's loss depends on each example of a training: through the whole training, or at its end.

The training is taken again by an AdamW that is smooth: it has ε₀ = `EPS_ROOT` under its root, as plain AdamW has no
derivative where a moment is 0. It ends elsewhere than the run did, and how far, the losses of the answer tell.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad

from fgpt.adapter_dora import with_norms
from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt, dora_norms
from fgpt.cli.console import show_progress
from fgpt.cli.training.build import make_tuning_step
from fgpt.cli.training.job import TrainingJob, place
from fgpt.cli.training.objectives import load_teacher, token_loss
from fgpt.data.packing import collate
from fgpt.errors import InputError
from fgpt.losses import Batch, nll
from fgpt.optim import adamw
from fgpt.recipes import InstructionRecipe
from fgpt.rng import fold_in
from fgpt.train_step import State, init_state
from fgpt.transforms.per_example import gradient_similarity
from fgpt.transforms.unroll import metagradient, unroll
from fgpt.tree import device

EPS_ROOT = 1e-6
"""ε₀ of the smooth AdamW. The linear datamodeling score of nano's metagradients was measured with it (RESULTS.md)."""


@dataclass(frozen=True)
class Attribution:
    """What each example does for an answer."""

    effects: Float[Tensor, " examples"]
    """By how many nats the answer's loss, summed over its tokens, rises if the example is left out, to first order; or
    the cosine of the two gradients."""
    loss: float
    """Of the answer, after the training that `effects` are of."""


def through_training(recipe: InstructionRecipe, job: TrainingJob, query: Batch) -> Attribution:
    """The effects on the loss of `query`, through every step of the training.

    Raises InputError for a training whose optimizer is not AdamW.
    """
    if recipe.optimizer not in ("adamw", "adamw8bit") or recipe.ema_decay is not None:
        optimizer_name = recipe.optimizer if recipe.ema_decay is None else "an average by --ema-decay"
        raise InputError(
            f"the run was trained with {optimizer_name}, and metagradients are those of AdamW: give --method cosine"
        )
    assert job.row_indices is not None
    optimizer = adamw(
        job.schedule, eps_root=EPS_ROOT, weight_decay=recipe.weight_decay, lr_multipliers=recipe.multipliers
    )
    objective = token_loss(replace(recipe, compile=False), load_teacher(recipe))
    step = make_tuning_step(optimizer, objective, neftune_noise_alpha=recipe.neftune_noise_alpha)
    initial = job.initial_state.peek().trainable
    target = device(initial)
    updates = list(itertools.islice(zip(job.batches(0), job.row_indices(0)), job.steps))
    with show_progress("differentiating the training", 3 * job.steps) as report:

        def advance(state: State, t: int, weights: Float[Tensor, " examples"]) -> State:
            report(1)
            batches, rows = updates[t]
            weighted: list[Batch] = []
            for batch, indices in zip(batches, rows, strict=True):
                on_device = place(batch, target)
                of_examples = weights[example_at(batch, indices).to(target)]
                weighted.append(replace(on_device, weights=on_device.weights * of_examples))
            return step(state, job.frozen, weighted, fold_in(job.rng, t))[0]

        weights = torch.ones(len(job.examples), device=target)
        result = unroll(advance, init_state(initial, optimizer), weights, job.steps)
        trained = result.final.trainable
        cotangent = grad(lambda adapters: answer_loss(job.frozen, adapters, query))(trained)
        effects = -metagradient(advance, result, weights, cotangent).meta
    return Attribution(effects.cpu(), float(answer_loss(job.frozen, trained, query)))


def at_the_end(job: TrainingJob, adapters: Adapters, query: Batch) -> Attribution:
    """The cosine of each example's gradient with that of `query`, at the trained adapters."""

    def loss(adapters: Adapters, row: Batch) -> Float[Tensor, ""]:
        return nll(adapt(job.frozen, adapters), row)[0]

    target = device(adapters)
    rows = [place(replace(collate([[example]]), loss_positions=None), target) for example in job.examples]
    similarity = gradient_similarity(loss, adapters, rows, [place(query, target)])
    return Attribution(similarity[:, 0].cpu(), float(loss(adapters, place(query, target))))


def answer_loss(frozen: Any, adapters: Adapters, query: Batch) -> Float[Tensor, ""]:
    """The sum over the answer's tokens. Its derivative follows a DoRA's norms, which to `adapt` are constants."""
    params = adapt(frozen, with_norms(adapters, dora_norms(frozen, adapters)))
    return nll(params, place(query, device(adapters)))[0]


def example_at(batch: Batch, row_indices: list[list[int]]) -> Int[Tensor, "rows seq"]:
    """The index of the example at each position of a batch; at padding, of any.

    Args:
        batch: A micro-batch.
        row_indices: The indices of the examples of each row, in order.

    >>> text = torch.zeros(1, 4, dtype=torch.int64)
    >>> example_at(Batch(text, text, text.float(), segments=torch.tensor([[1, 1, 2, 0]])), [[7, 5]])
    tensor([[7, 7, 5, 5]])
    """
    most = max(map(len, row_indices))
    table = torch.tensor([[*row, *[row[-1]] * (most - len(row))] for row in row_indices])
    number = torch.zeros_like(batch.tokens) if batch.segments is None else batch.segments - 1
    return table.gather(1, number % most)
