"""Label smoothing: a part of each target's probability is spread over the whole vocabulary."""

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.losses import Batch, at_loss, loss_hidden
from fgpt.model import GPT, logits


@check_shapes
def smoothed_nll(
    params: GPT, batch: Batch, *, label_smoothing: float, remat: bool = False, compile: bool = False
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ weight · loss, Σ weight), with the loss -(1 - ε) log p_y - ε mean_v log p_v of each target y.

    Args:
        params: The model, adapted or not.
        batch: Tokens, targets and the weight of each target.
        label_smoothing: ε, from 0 to 1.
        remat: Activation checkpointing.
        compile: Compile the transformer block.

    Raises:
        InputError: for an ε outside of 0 to 1.

    Source: Szegedy et al. 2016, section 7; torch's `cross_entropy(.., label_smoothing=ε)`.
    """
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing is {label_smoothing}: expected 0 to 1")
    y, weights = at_loss(batch.targets, batch), at_loss(batch.weights, batch)
    logp = at_least_fp32(logits(params, loss_hidden(params, batch, remat, compile))).log_softmax(-1)
    right = logp.gather(-1, y[:, None]).squeeze(-1)
    losses = -(1 - label_smoothing) * right - label_smoothing * logp.mean(-1)
    return (weights * losses).sum(), torch.sum(weights)
