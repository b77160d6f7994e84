"""torch.optim trains adapters: as the parameters of a module, and as the leaves themselves."""

from typing import Any

import torch
from builders import close
from builders.transforms import ADAPTERS, ROWS, loss
from torch.func import grad

import fgpt
from fgpt.tree import leaves, replace_at, tree_leaves, tree_map

STEPS, LR, DECAY = 3, 1e-2, 0.1


def by_fgpt() -> Any:
    optimizer, adapters = fgpt.adamw(LR, weight_decay=DECAY), ADAPTERS
    state = optimizer.init(adapters)
    for _ in range(STEPS):
        adapters, state = optimizer.update(grad(loss)(adapters, ROWS), state, adapters)
    return adapters


def test_adamw_on_a_module_of_adapters_takes_the_steps_of_fgpt():
    module = fgpt.as_module(loss, ADAPTERS)
    optimizer = torch.optim.AdamW(module.parameters(), LR, weight_decay=DECAY)
    for _ in range(STEPS):
        optimizer.zero_grad()
        module(ROWS).backward()
        optimizer.step()
    got = replace_at(ADAPTERS, module.state_dict())
    close(got, by_fgpt(), 1e-5)
    assert max(float((x - y).abs().max()) for x, y in zip(tree_leaves(got), tree_leaves(ADAPTERS))) > LR


def test_adamw_on_the_leaves_themselves():
    trained = tree_map(lambda x: x.clone().requires_grad_(), ADAPTERS)
    optimizer = torch.optim.AdamW(tree_leaves(trained), LR, weight_decay=DECAY)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(trained, ROWS).backward()
        optimizer.step()
    close(tree_map(torch.detach, trained), by_fgpt(), 1e-5)


def test_lbfgs_calls_the_module_again():
    """An optimizer that evaluates the loss several times in a step."""
    module = fgpt.as_module(loss, ADAPTERS)
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.5, max_iter=4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = module(ROWS)
        value.backward()
        return value

    before = float(optimizer.step(closure).detach())  # pyright: ignore
    assert float(module(ROWS).detach()) < before
    assert module.state_dict().keys() == leaves(ADAPTERS).keys()
