"""A training step of several LoRAs over one base: as one stack, and one after the other."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fgpt.adapter_lora import lora
from fgpt.adapters import adapt
from fgpt.losses import Batch, nll
from fgpt.model import GPT
from fgpt.optim import adamw
from fgpt.rng import key
from fgpt.sweeps import stack_batches, stack_states, sweep_step
from fgpt.train_step import init_state, make_step
from fgpt.tree import device


def steps_of_members(
    base: GPT, members: int, rows: int, tokens: int, remat: bool = False
) -> tuple[Callable[[], Any], Callable[[], list[Any]]]:
    """Calls that take the step of all members over a base: as one, and one after the other."""
    target = device(base)
    optimizer, generator = adamw(0.0), torch.Generator().manual_seed(0)
    text = torch.randint(0, base.cfg.vocab_size, (members, rows, tokens + 1), generator=generator).to(target)
    batches = [Batch(x[:, :-1], x[:, 1:], torch.ones(rows, tokens, device=target)) for x in text]
    lrs = torch.logspace(-4, -2, members, device=target)
    states = [init_state(lora(base, key(i), rank=8), optimizer) for i in range(members)]

    def loss(adapters: Any, params: GPT, batch: Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        return nll(adapt(params, adapters, rng=seed), batch, remat=remat)

    step = sweep_step(lambda h: make_step(loss, adamw(h["lr"])))
    stack, together = stack_states(states, optimizer), stack_batches([[batch] for batch in batches])
    alone = [partial(make_step(loss, adamw(float(lr))), x, base, [b], None) for lr, x, b in zip(lrs, states, batches)]
    return lambda: step(stack, base, together, None, {"lr": lrs}), lambda: [call() for call in alone]
