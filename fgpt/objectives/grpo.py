"""Group relative policy optimization: several answers to one prompt, each weighted by how much better than the group's
mean its reward is.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.errors import InputError
from fgpt.losses import Batch, token_nll
from fgpt.model import GPT, SharedPrompts
from fgpt.tree import node


@node
class RolloutBatch:
    """Sampled answers and their advantages.

    Args:
        batch: A row for each prompt with its answer, or for each answer alone if there are `prompts`; the weights are 1
            on the answer. Its `loss_positions`, if any, are those.
        advantages: Of each row.
        old: The log-probability of each target under the policy that sampled the answers, in the order of
            `fgpt.losses.token_nll`. None takes the policy itself: the first update after sampling.
        reference: The same under the reference policy; needed for a penalty on the divergence from it.
        prompts: What the rows continue, each prompt once; None if they have their prompts in them.
    """

    batch: Batch
    advantages: Float[Tensor, " rows"]
    old: Float[Tensor, " n"] | None = None
    reference: Float[Tensor, " n"] | None = None
    prompts: SharedPrompts | None = None


@check_shapes
def group_advantages(
    rewards: Float[Tensor, "groups answers"], *, scale: bool = True
) -> Float[Tensor, "groups answers"]:
    """(reward - mean of the group) / (standard deviation of the group + 1e-4). A group of equal rewards gives zeros.

    Args:
        rewards: Of each answer to each prompt.
        scale: Divide by the standard deviation, as GRPO does. Without it, hard and easy prompts count alike (Dr. GRPO).

    Raises:
        InputError: for groups of one answer, and for a reward that is not finite.

    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2; Liu et al. 2025 (Dr. GRPO), section 3.

    >>> group_advantages(torch.tensor([[1.0, 0.0], [2.0, 2.0]]), scale=False)
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    if rewards.shape[-1] < 2:
        raise InputError("a group of one answer has no advantage: expected 2 or more answers to each prompt")
    if not torch.isfinite(rewards).all():
        raise InputError("a reward is not a finite number: fix the reward function")
    # The mean of equal numbers may differ from them by rounding, which a division by a small deviation would magnify.
    is_equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    advantages = torch.where(is_equal, 0.0, rewards - rewards.mean(-1, keepdim=True))
    return advantages / (rewards.std(-1, keepdim=True) + 1e-4) if scale else advantages


@check_shapes
def grpo_losses(
    logprobs: Float[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    old: Float[Tensor, " n"],
    reference: Float[Tensor, " n"] | None = None,
    *,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, " n"]:
    """The loss of each token, with the ratio r = π / π_old of its probabilities and q = π_ref / π:

        -min(r A, clip(r, 1 - ε_low, 1 + ε_high) A) + β (q - log q - 1)

    Args:
        logprobs: log π of each sampled token.
        advantages: Of the answer that each token is in.
        old: log π_old, a constant.
        reference: log π_ref, a constant; needed for a β that is not 0.
        beta: The weight of the divergence from the reference.
        clip_low: ε_low.
        clip_high: ε_high; above ε_low, rare tokens may grow faster (DAPO).

    Raises:
        InputError: for a β without a reference.

    Source: Shao et al. 2024 (DeepSeekMath), equations 3 and 4; Yu et al. 2025 (DAPO), equation 10.

    >>> grpo_losses(torch.zeros(2), torch.tensor([1.0, -1.0]), torch.tensor([-1.0, -1.0]))
    tensor([-1.2000,  2.7183])
    """
    ratio = torch.exp(logprobs - old)
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if beta == 0:
        return losses
    if reference is None:
        raise InputError(f"beta is {beta}: expected the reference's log-probabilities as well, or beta 0")
    log_q = reference - logprobs
    return losses + beta * (torch.expm1(log_q) - log_q)


@check_shapes
def grpo(
    params: GPT,
    rollouts: RolloutBatch,
    *,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    remat: bool = False,
    compile: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ loss, number of tokens), see `grpo_losses`: every token of a batch counts the same, whatever the length of its
    answer (DAPO).

    Args:
        params: The policy.
        rollouts: Answers with their advantages.
        beta: The weight of the divergence from the reference.
        clip_low: ε_low.
        clip_high: ε_high.
        remat: Activation checkpointing.
        compile: Compile the transformer block.

    Raises:
        InputError: as `grpo_losses` does.
    """
    batch = rollouts.batch
    nll, weights = token_nll(params, batch, remat, compile, rollouts.prompts)
    seq = batch.tokens.shape[-1]
    positions = batch.loss_positions
    if positions is None:
        advantages = rollouts.advantages.repeat_interleave(seq)
    else:
        advantages = rollouts.advantages[positions // seq]
    old = -nll.detach() if rollouts.old is None else rollouts.old
    losses = grpo_losses(-nll, advantages, old, rollouts.reference, beta=beta, clip_low=clip_low, clip_high=clip_high)
    return (weights * losses).sum(), weights.sum()
