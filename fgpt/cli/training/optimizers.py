"""The optimizer and the schedule of a recipe that fine-tunes."""

from collections.abc import Callable

import torch

from fgpt.kernels.adam import Number
from fgpt.optim import Optimizer, Schedule, adamw, adamw8bit, constant_schedule, cosine_schedule, linear_schedule
from fgpt.optim_averages import with_ema
from fgpt.optim_muon import muon
from fgpt.optim_schedule_free import schedule_free_adamw
from fgpt.recipes import FineTuningRecipe

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "muon": muon,
    "schedule_free_adamw": schedule_free_adamw,
}


def make_schedule(recipe: FineTuningRecipe, steps: int) -> Schedule:
    """A linear warmup and the recipe's decay to 0; of schedule-free AdamW the warmup alone. A run that was lengthened
    has the schedule of its former length until it had finished.
    """
    schedule = _one_schedule(recipe, steps)
    for end in sorted(recipe.lengthened_at, reverse=True):
        schedule = _in_turn(_one_schedule(recipe, end), end, schedule)
    return schedule


def _in_turn(first: Schedule, end: int, then: Schedule) -> Schedule:
    return lambda step: torch.where(step < end, first(step), then(step))


def _one_schedule(recipe: FineTuningRecipe, steps: int) -> Schedule:
    warmup_steps = recipe.num_warmup_steps(steps)
    if recipe.optimizer == "schedule_free_adamw":
        return constant_schedule(recipe.peak_lr, warmup_steps)
    decay = {"cosine": cosine_schedule, "linear": linear_schedule}[recipe.lr_scheduler_type]
    return decay(recipe.peak_lr, steps, warmup_steps=warmup_steps)


def make_optimizer(recipe: FineTuningRecipe, schedule: Schedule, weight_decay: Number | None = None) -> Optimizer:
    """The recipe's optimizer at any schedule and weight decay; None takes the recipe's. Raises InputError as the
    optimizer does.
    """
    make = OPTIMIZERS[recipe.optimizer]
    decay = recipe.weight_decay if weight_decay is None else weight_decay
    optimizer = make(schedule, weight_decay=decay, lr_multipliers=recipe.multipliers)
    return optimizer if recipe.ema_decay is None else with_ema(optimizer, recipe.ema_decay)
