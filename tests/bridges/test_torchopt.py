"""TorchOpt's functional optimizers over adapters."""

from typing import Any

import pytest
import torch
from builders import close
from builders.transforms import ADAPTERS, BASE, ROWS, loss
from torch import Tensor
from torch.func import grad

import fgpt
from fgpt.tree import tree_leaves, tree_map

pytest.importorskip("optree")
torchopt = pytest.importorskip("torchopt")
fgpt.register_with_optree()


def as_optimizer(transform: Any) -> fgpt.Optimizer:
    """TorchOpt's transformation, which returns changes and works in place, as an fgpt optimizer."""

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        changes, state = transform.update(grads, state, params=params, inplace=False)
        return torchopt.apply_updates(params, changes, inplace=False), state

    return fgpt.Optimizer(transform.init, update)


def nll(adapters: Any, base: Any, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(base, adapters), batch)


def test_adam_takes_the_steps_of_fgpt():
    before, ends = tree_map(torch.clone, ADAPTERS), []
    for optimizer in (as_optimizer(torchopt.adam(1e-2)), fgpt.adamw(1e-2, weight_decay=0.0)):
        adapters, state = ADAPTERS, optimizer.init(ADAPTERS)
        for _ in range(3):
            adapters, state = optimizer.update(grad(loss)(adapters, ROWS), state, adapters)
        ends.append(adapters)
    close(ends[0], ends[1], 1e-5)
    close(ADAPTERS, before, 0.0)
    assert max(float((x - y).abs().max()) for x, y in zip(tree_leaves(ends[0]), tree_leaves(before))) > 1e-2


def test_a_chain_trains_in_a_step():
    """By hand: the gradient is clipped to a norm of 0.1, and descent follows."""
    optimizer = as_optimizer(torchopt.chain(torchopt.clip_grad_norm(0.1), torchopt.sgd(0.5)))
    step = fgpt.make_step(nll, optimizer, max_norm=None)
    state, metrics = step(fgpt.init_state(ADAPTERS, optimizer), BASE, [ROWS], None)
    assert float(metrics.grad_norm) > 0.1
    factor = 0.5 * 0.1 / metrics.grad_norm
    expected = tree_map(lambda x, g: x - factor * g, ADAPTERS, grad(loss)(ADAPTERS, ROWS))
    close(state.trainable, expected, 1e-5)
