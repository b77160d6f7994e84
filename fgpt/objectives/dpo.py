"""Direct preference optimization: the preferred answer becomes more likely than the other, relative to a reference."""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.errors import InputError
from fgpt.model import GPT
from fgpt.objectives.logprobs import sequence_logprobs
from fgpt.objectives.pairs import PairBatch, log_ratios

DPOLoss: TypeAlias = Literal["sigmoid", "ipo", "hinge", "robust"]


@check_shapes
def dpo_losses(
    chosen: Float[Tensor, " n"],
    rejected: Float[Tensor, " n"],
    *,
    beta: float = 0.1,
    loss_type: DPOLoss = "sigmoid",
    label_smoothing: float = 0.0,
) -> Float[Tensor, " n"]:
    """The loss of each pair, with h = log-ratio of the chosen answer - log-ratio of the rejected one:

        sigmoid   -(1 - ε) log σ(βh) - ε log σ(-βh)
        robust    [-(1 - ε) log σ(βh) + ε log σ(-βh)] / (1 - 2ε)
        ipo       (h - 1 / 2β)²
        hinge     max(0, 1 - βh)

    Args:
        chosen: log π(y|x) - log π_ref(y|x) of the chosen answers; for ipo, per token.
        rejected: The same of the rejected answers.
        beta: How closely the policy is held to the reference.
        loss_type: Which of them.
        label_smoothing: ε, the share of pairs whose label is wrong, below 0.5; for sigmoid and robust alone.

    Raises:
        InputError: for a beta that is not positive, and for an ε that the loss does not have.

    Source: Rafailov et al. 2023 (DPO), equation 7; Mitchell 2023 (conservative DPO); Chowdhury et al. 2024 (robust);
    Azar et al. 2023 (IPO), equation 17; Zhao et al. 2023 (SLiC) for the hinge.

    >>> dpo_losses(torch.tensor([2.0]), torch.tensor([2.0]))  # log 2: no preference yet
    tensor([0.6931])
    """
    if not beta > 0:
        raise InputError(f"beta is {beta}: expected a positive number")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in ("sigmoid", "robust")):
        raise InputError(f"label_smoothing is {label_smoothing}: expected 0 to 0.5 with sigmoid or robust, else 0")
    h = chosen - rejected
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)).square()
    if loss_type == "hinge":
        return torch.relu(1 - beta * h)
    right, wrong = (1 - label_smoothing) * F.logsigmoid(beta * h), label_smoothing * F.logsigmoid(-beta * h)
    if loss_type == "robust":
        return (wrong - right) / (1 - 2 * label_smoothing)
    return -right - wrong


@check_shapes
def dpo(
    params: GPT,
    pairs: PairBatch,
    *,
    beta: float = 0.1,
    loss_type: DPOLoss = "sigmoid",
    label_smoothing: float = 0.0,
    rpo_alpha: float = 0.0,
    remat: bool = False,
    compile: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ loss, number of pairs), see `dpo_losses`. For ipo the log-ratios are per token, as its authors use it.

    With an α a pair's loss has a second term, α times the mean nll per token of its chosen answer: DPO alone may make
    both answers less likely.

    Args:
        params: The policy.
        pairs: With the log-probabilities of the reference.
        beta: How closely the policy is held to the reference.
        loss_type: Which loss.
        label_smoothing: The share of pairs whose label is wrong.
        rpo_alpha: α. TRL's loss type sft with this weight is its mean over all tokens of a batch; here a pair is a
            function of itself alone.
        remat: Activation checkpointing.
        compile: Compile the transformer block.

    Raises:
        InputError: as `dpo_losses` does, and if the pairs have no reference.

    Source: Rafailov et al. 2023 (DPO), equation 7; Pang et al. 2024 (iterative RPO), equation 1, for α.

    >>> import fgpt
    >>> from fgpt.objectives.pairs import with_reference
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> text = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])  # one pair: the prompt 1 2, the answers 3 4 and 5 6
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.tensor([[0.0, 1.0, 1.0]] * 2))
    >>> total, count = dpo(params, with_reference(params, PairBatch(batch)))
    >>> f"{float(total / count):.4f}"
    '0.6931'
    """
    policy = sequence_logprobs(params, pairs.batch, remat, compile)
    chosen, rejected = log_ratios(policy, pairs)
    if loss_type == "ipo":
        chosen_lengths, rejected_lengths = policy.lengths.clamp(min=1).chunk(2)
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    losses = dpo_losses(chosen, rejected, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing)
    if rpo_alpha:
        losses = losses - rpo_alpha * policy.means.chunk(2)[0]
    return losses.sum(), losses.new_tensor(len(losses))
