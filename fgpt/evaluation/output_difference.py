"""How much a transform that should change nothing changes the outputs of a model."""

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.precision import at_least_fp32
from fgpt.losses import Batch, loss
from fgpt.model import GPT, apply
from fgpt.tree import node


@node
class OutputDifference:
    """How far two models differ on a batch.

    Args:
        logit: The largest absolute change of a logit.
        nll: The change of the mean loss, in nats per weighted token; positive if the second model is worse.

    >>> OutputDifference(logit=torch.tensor(0.5), nll=torch.tensor(-0.1)).logit
    tensor(0.5000)
    """

    logit: Float[Tensor, ""]
    nll: Float[Tensor, ""]


@torch.no_grad()
def compare_outputs(before: GPT, after: GPT, batch: Batch) -> OutputDifference:
    """How far the outputs of `after` differ from those of `before` on `batch`, as after merging into a quantized
    base, a change of dtype, or quantization.

    Args:
        before: A model.
        after: A model of the same vocabulary.
        batch: What both are run on, padding included.

    Raises:
        InputError: if a row is longer than the context.

    >>> import fgpt, torch
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, text = fgpt.init(config, fgpt.key(0)), torch.tensor([[1, 2, 3, 4]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3))
    >>> fgpt.compare_outputs(params, params, batch).logit
    tensor(0.)
    """
    a, b = (at_least_fp32(apply(params, batch.tokens, batch.segments)) for params in (before, after))
    return OutputDifference((b - a).abs().max(), loss(after, batch) - loss(before, batch))
