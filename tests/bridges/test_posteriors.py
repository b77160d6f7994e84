"""posteriors samples adapters, and its diagonal Fisher is that of a loop."""

from typing import Any

import pytest
import torch
from builders import close, tiny, with_noise
from builders.transforms import ROWS
from torch import Tensor
from torch.func import grad

import fgpt
from fgpt.tree import tree_map

optree = pytest.importorskip("optree")
posteriors = pytest.importorskip("posteriors")
fgpt.register_with_optree()

BASE = tiny(d_model=64, d_mlp=64)
FORMATS = pytest.mark.parametrize("base", [BASE, fgpt.quantize(BASE, "int8")], ids=["fp32", "int8"])
LR = 1e-3


def adapters_over(base: Any) -> Any:
    return with_noise(fgpt.lora(base, fgpt.key(0), 2) | fgpt.trainable_leaves(base, r"ln_f\..*"), 0.05)


def log_posterior_over(base: Any) -> Any:
    def log_posterior(adapters: Any, batch: fgpt.Batch) -> tuple[Tensor, Tensor]:
        return -fgpt.nll(fgpt.adapt(base, adapters), batch)[0], torch.tensor([])

    return log_posterior


def score(base: Any, adapters: Any, batch: fgpt.Batch = ROWS) -> Any:
    return grad(lambda a: log_posterior_over(base)(a, batch)[0])(adapters)


def noise_like(tree: Any) -> Any:
    """What torch's global generator gives to the leaves in optree's order."""
    return optree.tree_map(torch.randn_like, tree)


@FORMATS
def test_a_step_of_langevin_dynamics_by_hand(base: Any):
    adapters = adapters_over(base)
    sampler = posteriors.sgmcmc.sgld.build(log_posterior_over(base), lr=LR)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state, _ = sampler.update(sampler.init(adapters), ROWS)
        torch.manual_seed(3)
        noise = noise_like(adapters)
    expected = tree_map(lambda x, g, z: x + LR * g + (2 * LR) ** 0.5 * z, adapters, score(base, adapters), noise)
    close(state.params, expected, 1e-5)
    assert isinstance(state.params["blocks.0.attn.q"], fgpt.LoRA)


def test_steps_of_hamiltonian_dynamics_by_hand():
    """θ' = θ + ε m,    m' = m + ε ∇ log p(θ) - ε α m + √(2 α ε) z."""
    adapters = adapters_over(BASE)
    sampler = posteriors.sgmcmc.sghmc.build(log_posterior_over(BASE), lr=LR, alpha=0.1)
    params, momenta = adapters, tree_map(lambda x: torch.full_like(x, 0.5), adapters)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = sampler.init(adapters, momenta=0.5)
        for _ in range(2):
            state, _ = sampler.update(state, ROWS)
        torch.manual_seed(3)
        for _ in range(2):
            kick = tree_map(
                lambda g, m, z: LR * g - LR * 0.1 * m + (0.2 * LR) ** 0.5 * z,
                score(BASE, params),
                momenta,
                noise_like(adapters),
            )
            params = tree_map(lambda x, m: x + LR * m, params, momenta)
            momenta = tree_map(torch.add, momenta, kick)
    close(state.params, params, 1e-5)
    close(state.momenta, momenta, 1e-4)


@FORMATS
def test_the_diagonal_fisher_is_a_sum_of_squared_gradients(base: Any):
    adapters = adapters_over(base)
    laplace = posteriors.laplace.diag_fisher.build(log_posterior_over(base))
    state, _ = laplace.update(laplace.init(adapters), ROWS)
    total = tree_map(torch.zeros_like, adapters)
    for i in range(len(ROWS.tokens)):
        row = tree_map(lambda x, i=i: x[i : i + 1], ROWS)
        total = tree_map(lambda t, g: t + g.square(), total, score(base, adapters, row))
    close(state.prec_diag, total, 1e-5, rtol=1e-4)
