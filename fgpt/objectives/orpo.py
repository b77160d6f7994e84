"""Odds ratio preference optimization: the chosen answer is learned, and its odds grow against the rejected one's. There
is no reference policy.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.model import GPT
from fgpt.objectives.logprobs import sequence_logprobs
from fgpt.objectives.pairs import PairBatch


@check_shapes
def odds_ratio_losses(chosen: Float[Tensor, " n"], rejected: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """-log σ(log odds(chosen) - log odds(rejected)), with odds(p) = p / (1 - p).

    Args:
        chosen: The mean log-probability per token of the chosen answers, below 0.
        rejected: The same of the rejected answers.

    Source: Hong et al. 2024 (ORPO), equations 4 and 7.

    >>> odds_ratio_losses(torch.tensor([-0.5]), torch.tensor([-0.5]))
    tensor([0.6931])
    """
    return -F.logsigmoid(chosen - rejected - log1mexp(chosen) + log1mexp(rejected))


def log1mexp(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log(1 - eˣ) for x < 0, accurate near 0 and far below it; of an x that has rounded to 0, of the number below it.

    Source: Mächler 2012, equation 7.

    >>> log1mexp(torch.tensor([-1e-6, -50.0]))
    tensor([-1.3816e+01, -1.9287e-22])
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near, split = x > -0.6931471805599453, torch.tensor(-0.6931471805599453, dtype=x.dtype, device=x.device)
    below = torch.log1p(-torch.exp(torch.where(near, split, x)))  # each branch gets values that it can take: no NaN
    above = torch.log(-torch.expm1(torch.where(near, x, split)))
    return torch.where(near, above, below)


@check_shapes
def orpo(
    params: GPT, pairs: PairBatch, *, beta: float = 0.1, remat: bool = False, compile: bool = False
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ loss, number of pairs), where a pair's loss is the mean nll per token of its chosen answer plus beta times its
    odds ratio loss.

    TRL's nll is that of prompt and answer, and its mean is over the tokens of all chosen answers together; here a pair
    is a function of itself alone, so that a batch is the sum of its pairs.

    Args:
        params: The policy.
        pairs: Without a reference.
        beta: The weight of the odds ratio, λ in the paper.
        remat: Activation checkpointing.
        compile: Compile the transformer block.

    Source: Hong et al. 2024 (ORPO), equation 6.
    """
    chosen, rejected = sequence_logprobs(params, pairs.batch, remat, compile).means.chunk(2)
    losses = beta * odds_ratio_losses(chosen, rejected) - chosen
    return losses.sum(), losses.new_tensor(len(losses))
