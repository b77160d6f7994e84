"""Lifted functions compiled and recomputed."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from builders import with_noise
from builders.lifted_modules import X, assert_near, lifted_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fgpt
from fgpt.tree import leaves

# --------------------------------------------------------------------------------------------- the module is left alone


OUTSIDE = """
import torch
from torch import nn
from torch.func import grad

import fgpt

module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
params, apply = fgpt.from_module(module)
adapters, x = fgpt.dora(params, fgpt.key(0), 2, target="0|2"), torch.ones(3, 6)
fn = grad(lambda a: apply(fgpt.adapt(params, a), x).square().mean())
compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")(adapters)
for path, expected in fgpt.tree.leaves(fn(adapters)).items():
    torch.testing.assert_close(fgpt.tree.leaves(compiled)[path], expected)
for thing in (lambda x: x, nn.Linear):
    try:
        fgpt.from_module(thing)
    except fgpt.InputError as err:
        print(err)
"""


@pytest.mark.slow
def test_gradients_compile_whole_and_what_is_no_module_is_named():
    """In a process of its own: the whole-package check of these tests is what a compiler cannot trace, and what
    refuses an argument of another type first.
    """
    done = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True, check=False)
    named = [f"from_module expects an ordinary nn.Module, got {name}" for name in ("function", "type")]
    assert done.stdout.splitlines() == named, done.stderr[-3000:]


# -------------------------------------------------------------------------------------------------------- recomputation


class Recomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def inner(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # pyright: ignore


def test_a_module_that_recomputes_is_refused(gpt2: Any):
    """torch.func.functional_call alone gives, without a word, the gradient of another model."""
    params, apply = fgpt.from_module(Recomputing())
    with pytest.raises(fgpt.InputError, match="turn its activation checkpointing off"):
        apply(
            fgpt.adapt(params, {path: x.requires_grad_() for path, x in leaves(fgpt.trainable_leaves(params)).items()}),
            X[:, :4] / 31,
        )
    for reentrant in (False, True):
        module = copy.deepcopy(gpt2).train()
        module.gradient_checkpointing_enable({"use_reentrant": reentrant})
        params, apply = fgpt.from_module(module)
        with pytest.raises(fgpt.InputError, match="turn its activation checkpointing off"):
            apply(params, X)
        module.eval()  # where transformers recomputes nothing
        assert torch.equal(apply(params, X).logits, gpt2(X).logits)


def test_the_whole_call_may_be_recomputed(gpt2: nn.Module):
    params, apply = fgpt.from_module(gpt2)
    tuned = {path: x.requires_grad_() for path, x in with_noise(fgpt.trainable_leaves(params)).items()}

    def loss(tuned: Any) -> Tensor:
        return lifted_loss(params, apply)(tuned)

    got, expected = (
        torch.autograd.grad(value, list(tuned.values()), materialize_grads=True)
        for value in (checkpoint(loss, tuned, use_reentrant=False), loss(tuned))
    )
    assert_near(list(got), list(expected))  # pyright: ignore
