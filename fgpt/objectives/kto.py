"""Kahneman-Tversky optimization: answers that are good or bad, each by itself."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.objectives.logprobs import sequence_logprobs
from fgpt.tree import node


@node
class JudgedBatch:
    """Answers, each labeled good or bad.

    Args:
        batch: A row for each prompt with its answer; the weights are 1 on the answer.
        labels: Whether each answer is good.
        reference: The reference policy's log-probability of each answer.
        mismatched: The prompts, each with the answer of another row: the policy's divergence from the reference is
            estimated from them.
        mismatched_reference: The reference policy's log-probability of these.
    """

    batch: Batch
    labels: Bool[Tensor, " rows"]
    reference: Float[Tensor, " rows"] | None = None
    mismatched: Batch | None = None
    mismatched_reference: Float[Tensor, " others"] | None = None

    @property
    def tokens(self) -> Int[Tensor, "*rows seq"]:
        """Those of all answers."""
        return self.batch.tokens


def with_reference(params: GPT, judged: JudgedBatch) -> JudgedBatch:
    """`judged` with the log-probabilities of the reference policy `params`, usually the base without the adapter."""
    with torch.no_grad():
        reference = sequence_logprobs(params, judged.batch).sums
        others = None if judged.mismatched is None else sequence_logprobs(params, judged.mismatched).sums
    return JudgedBatch(judged.batch, judged.labels, reference, judged.mismatched, others)


@check_shapes
def kto_losses(
    log_ratios: Float[Tensor, " n"],
    labels: Bool[Tensor, " n"],
    divergence: Float[Tensor, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " n"]:
    """The loss of each answer, with its log-ratio r and the divergence z, a constant to every derivative:

        good    w_good (1 - σ(β (r - z)))
        bad     w_bad  (1 - σ(β (z - r)))

    Args:
        log_ratios: log π(y|x) - log π_ref(y|x).
        labels: Whether each answer is good.
        divergence: An estimate of KL(π ‖ π_ref), in nats; a negative one counts as 0.
        beta: How closely the policy is held to the reference.
        desirable_weight: Of good answers.
        undesirable_weight: Of bad answers. Its number of answers times its weight should be 3/4 to 1 times that of the
            good ones.

    Source: Ethayarajh et al. 2024 (KTO), equation 7.

    >>> kto_losses(torch.tensor([0.0, 0.0]), torch.tensor([True, False]), torch.tensor(0.0))
    tensor([0.5000, 0.5000])
    """
    margin = beta * (log_ratios - divergence.detach().clamp(min=0))
    good = desirable_weight * torch.sigmoid(-margin)  # 1 - σ(m) = σ(-m)
    return torch.where(labels, good, undesirable_weight * torch.sigmoid(margin))


@check_shapes
def kto(
    params: GPT,
    judged: JudgedBatch,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    remat: bool = False,
    compile: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ loss, number of answers), see `kto_losses`. The divergence is the mean log-ratio of the mismatched answers;
    without any it is 0.

    Args:
        params: The policy.
        judged: With the log-probabilities of the reference.
        beta: How closely the policy is held to the reference.
        desirable_weight: Of good answers.
        undesirable_weight: Of bad answers.
        remat: Activation checkpointing.
        compile: Compile the transformer block.

    Raises:
        InputError: if the batch has no reference.
    """
    if judged.reference is None or (judged.mismatched is not None and judged.mismatched_reference is None):
        raise InputError("the answers have no log-probabilities of a reference policy: add them by `with_reference`")
    policy = sequence_logprobs(params, judged.batch, remat, compile).sums
    divergence = policy.new_zeros(())
    if judged.mismatched is not None and judged.mismatched_reference is not None:
        others = sequence_logprobs(params, judged.mismatched).sums
        divergence = (others - judged.mismatched_reference).mean().detach()
    losses = kto_losses(
        policy - judged.reference,
        judged.labels,
        divergence,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    return losses.sum(), losses.new_tensor(len(losses))
