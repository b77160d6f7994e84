"""Pairs of answers to one prompt, of which the first is preferred."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgpt.errors import InputError
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.objectives.logprobs import SequenceLogprobs, sequence_logprobs
from fgpt.tree import node


@node
class PairBatch:
    """Rows of chosen answers, then in the same order the rows of rejected ones, each with its prompt.

    Args:
        batch: 2n rows; the weights are 1 on the answers.
        reference: The reference policy's log-probability of each row's answer; None for objectives without one.
    """

    batch: Batch
    reference: Float[Tensor, " rows"] | None = None

    @property
    def tokens(self) -> Int[Tensor, "*rows seq"]:
        """Those of all rows."""
        return self.batch.tokens


def with_reference(params: GPT, pairs: PairBatch) -> PairBatch:
    """`pairs` with the log-probabilities of the reference policy `params`, usually the base without the adapter."""
    with torch.no_grad():
        sums = sequence_logprobs(params, pairs.batch).sums
    return PairBatch(pairs.batch, sums.detach())


def log_ratios(policy: SequenceLogprobs, pairs: PairBatch) -> tuple[Tensor, Tensor]:
    """log π(y|x) - log π_ref(y|x) of the chosen and of the rejected answers.

    Raises:
        InputError: if the pairs have no reference.
    """
    if pairs.reference is None:
        raise InputError("the pairs have no log-probabilities of a reference policy: add them by `with_reference`")
    chosen, rejected = (policy.sums - pairs.reference).chunk(2)
    return chosen, rejected
