"""A reward model: a head of one row on a GPT, trained so that chosen answers get more than rejected ones."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.errors import InputError
from fgpt.losses import Batch, loss_hidden
from fgpt.model import GPT, lm_head
from fgpt.objectives.pairs import PairBatch
from fgpt.weights import linear, shape


@check_shapes
def rewards(params: GPT, batch: Batch, remat: bool = False, compile: bool = False) -> Float[Tensor, " rows"]:
    """The reward of each row, from the hidden state at its one position with a weight, that of its last token.

    Args:
        params: A model with a head of one row: `fgpt.with_classification_head(params, 1, rng)`.
        batch: A text a row.
        remat: Activation checkpointing.
        compile: Compile the transformer block.

    Raises:
        InputError: for a head of several rows.
    """
    head = lm_head(params)
    if (rows := shape(head.w)[0]) != 1:
        raise InputError(f"the head has {rows} rows: expected one: with_classification_head(params, 1, rng)")
    values = linear(loss_hidden(params, batch, remat, compile), head.w, head.b).squeeze(-1)
    return values if batch.loss_positions is not None else (values.view(batch.weights.shape) * batch.weights).sum(-1)


@check_shapes
def bradley_terry_losses(chosen: Float[Tensor, " n"], rejected: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """-log σ(reward of the chosen answer - reward of the rejected one).

    Source: Ouyang et al. 2022 (InstructGPT), equation 1.

    >>> import torch
    >>> bradley_terry_losses(torch.tensor([1.0]), torch.tensor([1.0]))
    tensor([0.6931])
    """
    return -F.logsigmoid(chosen - rejected)


@check_shapes
def bradley_terry(
    params: GPT, pairs: PairBatch, *, center: float = 0.0, remat: bool = False, compile: bool = False
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ loss, number of pairs) of a reward model.

    Args:
        params: A model with a head of one row.
        pairs: The weights of each row are 1 at its last token alone.
        center: The weight of (sum of both rewards)², which keeps rewards around 0.
        remat: Activation checkpointing.
        compile: Compile the transformer block.

    Raises:
        InputError: as `rewards` does.

    Source: Ouyang et al. 2022, equation 1; Eisenstein et al. 2023, equation 2, for `center`.
    """
    chosen, rejected = rewards(params, pairs.batch, remat, compile).chunk(2)
    losses = bradley_terry_losses(chosen, rejected) + center * (chosen + rejected).square()
    return losses.sum(), losses.new_tensor(len(losses))
