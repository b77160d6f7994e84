"""A training of a few numbers."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

import fgpt
from fgpt.adapters import adapt
from fgpt.cli.training.job import InitialState, TrainingJob
from fgpt.losses import Batch, nll
from fgpt.optim import adamw, constant_schedule
from fgpt.recipes import find
from fgpt.train_step import init_state, make_step

STEPS = 8


def tiny_job(nan_at: int | None = None, eval_losses: Any = None, steps: int = STEPS, **options: Any) -> TrainingJob:
    """A training whose weights are not finite in the batch of update `nan_at`; `options` are the recipe's."""
    base = fgpt.init(fgpt.Config(1, 2, 16, 40, 31, 32), fgpt.key(0))
    optimizer = adamw(1e-3)

    def batches(begin: int) -> Iterator[list[Batch]]:
        for number in itertools.count(begin):
            x = torch.randint(31, (2, 9), generator=fgpt.rng.fold_in(fgpt.key(1), number))
            weights = torch.full((2, 8), float("nan") if number + 1 == nan_at else 1.0)
            yield [Batch(x[:, :-1], x[:, 1:], weights)]

    return TrainingJob(
        recipe=replace(find("lora-nano"), **{"checkpoint_every_minutes": 99.0} | options),
        step=make_step(lambda a, frozen, batch, seed: nll(adapt(frozen, a), batch), optimizer),
        frozen=base,
        batches=batches,
        steps=steps,
        schedule=constant_schedule(1e-3),
        rng=fgpt.key(3),
        fingerprint={},
        initial_state=InitialState(init_state(fgpt.lora(base, fgpt.key(2), 2), optimizer)),
        tokenizer=fgpt.tokenizer("nano"),
        eval_losses=eval_losses or {},
    )
