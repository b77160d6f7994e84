"""opake clips the gradients of examples as fgpt does."""

from typing import Any

import pytest
from builders import close, tiny, with_noise
from builders.transforms import ROWS
from torch import Tensor

import fgpt
from fgpt.transforms.step_gradients import per_row_clipping

pytest.importorskip("optree")
clipping = pytest.importorskip("opake.dpsgd.clipping")
fgpt.register_with_optree()

BASE = tiny(d_model=64, d_mlp=64)


@pytest.mark.parametrize("to", [None, "int8", "nf4"])
@pytest.mark.parametrize("bound", [0.5, 1e9])
def test_sums_of_clipped_gradients_are_equal(bound: float, to: Any):
    base = BASE if to is None else fgpt.quantize(BASE, to)
    adapters = with_noise(fgpt.lora(base, fgpt.key(0), 2) | fgpt.trainable_leaves(base, r".*ln_.*"), 0.05)

    def of_row(adapters: Any, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return fgpt.nll(fgpt.adapt(base, adapters), fgpt.Batch(tokens[None], targets[None], weights[None]))[0]

    def nll(adapters: Any, base: Any, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        return fgpt.nll(fgpt.adapt(base, adapters), batch)

    clipped_grad, state = clipping.clipped_grad(of_row, clipping_norm=bound, batch_argnums=(1, 2, 3), return_aux=True)
    (got, aux), _ = clipped_grad(adapters, ROWS.tokens, ROWS.targets, ROWS.weights, state=state)
    assert bool((aux.grad_norms > bound).all()) == (bound < 1)
    expected, _ = per_row_clipping(bound)(nll, adapters, base, ROWS, None)
    close(got.pytree, expected, 1e-5)
