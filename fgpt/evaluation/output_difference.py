"""By how much a model answers differently after a transform that should have changed nothing."""

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.precision import at_least_fp32
from fgpt.losses import Batch, loss
from fgpt.model import GPT, apply
from fgpt.tree import node


@node
class OutputDifference:
    """The largest change of a logit, and the change of the mean loss in nats per weighted token."""

    logit: Float[Tensor, ""]
    nll: Float[Tensor, ""]


@torch.no_grad()
def compare_outputs(before: GPT, after: GPT, batch: Batch) -> OutputDifference:
    """What `batch` shows of the way from `before` to `after`: merging over a quantized base, rounding, quantizing."""
    a, b = (at_least_fp32(apply(params, batch.tokens, batch.segments)) for params in (before, after))
    return OutputDifference((b - a).abs().max(), loss(after, batch) - loss(before, batch))
