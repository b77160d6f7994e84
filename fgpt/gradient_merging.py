"""Merging by gradient: how much of each set of adapters every layer takes, learned on a few rows.

τ_l = Σ_i c_il τ_il        c = argmin_c Σ nll(θ + τ)
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.adapter_combining import combine
from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt
from fgpt.errors import InputError
from fgpt.losses import Batch, nll
from fgpt.optim import adamw
from fgpt.train_step import init_state, make_step
from fgpt.tree import device


class GradientMerge(NamedTuple):
    """What merging by gradient gives.

    Args:
        adapters: The combination.
        weights: The coefficients c of the sets, by the paths of adapters.
        losses: The mean loss before each update, in nats per weighted token.

    >>> GradientMerge({}, {}, torch.zeros(3)).losses.shape
    torch.Size([3])
    """

    adapters: Adapters
    weights: dict[str, Float[Tensor, " n"]]
    losses: Float[Tensor, " steps"]


def merge_by_gradient(
    params: Any, adapters: Sequence[Adapters], batches: Iterable[Sequence[Batch]], *, lr: float = 0.05
) -> GradientMerge:
    """Several sets of adapters over one base as one, by coefficients that are learned: one for each set at each path,
    1/n at first, a step of AdamW for each element of `batches`.

    Args:
        params: The base, quantized or not; over a quantized matrix all adapters must be LoRAs.
        adapters: Two sets or more, of any kinds.
        batches: The micro-batches of each step: a few rows of each task.
        lr: The learning rate of the coefficients.

    Raises:
        InputError: for fewer than two sets, or no batches, and as `combine` does.

    Source: Yang et al. 2024 (AdaMerging), section 3.2: layer-wise coefficients; here of a loss on labeled rows.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> text = torch.tensor([[1, 2, 3, 4]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3))
    >>> sets = [fgpt.lora(params, fgpt.key(i), rank=2) for i in (1, 2)]
    >>> merged = fgpt.merge_by_gradient(params, sets, [[batch]] * 3)
    >>> merged.weights["blocks.0.attn.q"].shape, merged.adapters["blocks.0.attn.q"].a.shape
    (torch.Size([2]), torch.Size([4, 8]))
    """
    count = len(adapters)
    if count < 2:
        raise InputError(f"expected two sets of adapters or more, got {count}")
    where = device(adapters[0])
    paths = dict.fromkeys(path for tree in adapters for path in tree)
    weights = {path: torch.full((count,), 1 / count, device=where) for path in paths}

    def loss(weights: Any, params: Any, batch: Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        return nll(adapt(params, combine(params, adapters, weights)), batch)

    optimizer = adamw(lr)
    step = make_step(loss, optimizer)
    state, losses = init_state(weights, optimizer), list[Tensor]()
    for micro_batches in batches:
        state, metrics = step(state, params, micro_batches, None)
        losses.append(metrics.loss)
    if not losses:
        raise InputError("no batches to learn from: expected the micro-batches of one step or more")
    learned = state.trainable
    numbers = {path: w.detach() for path, w in learned.items()}
    return GradientMerge(combine(params, adapters, numbers), numbers, torch.stack(losses))
