"""Simple preference optimization: the mean log-probability of the chosen answer exceeds the other's by a margin."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.model import GPT
from fgpt.objectives.logprobs import sequence_logprobs
from fgpt.objectives.pairs import PairBatch


@check_shapes
def simpo_losses(
    chosen: Float[Tensor, " n"], rejected: Float[Tensor, " n"], *, beta: float = 2.0, gamma: float = 1.0
) -> Float[Tensor, " n"]:
    """-log σ(β (chosen - rejected) - γ).

    Args:
        chosen: The mean log-probability per token of the chosen answers.
        rejected: The same of the rejected answers.
        beta: The scale of the rewards.
        gamma: The margin between them.

    Source: Meng et al. 2024 (SimPO), equation 6.

    >>> import torch
    >>> simpo_losses(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.6931])
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


@check_shapes
def simpo(
    params: GPT,
    pairs: PairBatch,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    remat: bool = False,
    compile: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ loss, number of pairs), see `simpo_losses`.

    Args:
        params: The policy.
        pairs: Without a reference.
        beta: The scale of the rewards.
        gamma: The margin between them.
        remat: Activation checkpointing.
        compile: Compile the transformer block.
    """
    chosen, rejected = sequence_logprobs(params, pairs.batch, remat, compile).means.chunk(2)
    losses = simpo_losses(chosen, rejected, beta=beta, gamma=gamma)
    return losses.sum(), losses.new_tensor(len(losses))
