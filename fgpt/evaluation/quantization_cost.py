r"""What the format of a base costs: its loss and the gradient of a LoRA over it, beside those of the full base.

    loss cost        L(Q) / L(W) - 1
    gradient error   ‖∂L(Q)/∂B - ∂L(W)/∂B‖ / ‖∂L(W)/∂B‖        of a fresh LoRA on every matrix of the blocks

The loss says how much of the base a format loses, and the gradient how far a training over it begins in another
direction.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value

from fgpt.adapter_lora import LoRA, lora
from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt
from fgpt.errors import InputError
from fgpt.losses import Batch, nll
from fgpt.model import GPT
from fgpt.rng import key


class BaseMeasurement(NamedTuple):
    """The loss of a base on a text, and a gradient over it.

    Args:
        loss: Mean loss in nats per weighted token.
        gradient: ∂loss/∂B of a fresh LoRA by its path; that of A is 0.

    >>> BaseMeasurement._fields
    ('loss', 'gradient')
    """

    loss: Float[Tensor, ""]
    gradient: dict[str, Float[Tensor, "out rank"]]


class QuantizationCost(NamedTuple):
    """How far a quantized base is from the full one.

    Args:
        full_loss: Mean loss of the full base, in nats per weighted token.
        loss: That of the quantized base.
        gradient_error: The norm of the difference of the gradients, relative to that over the full base.

    >>> f"{QuantizationCost(full_loss=2.0, loss=2.1, gradient_error=0.25).loss_increase:.1%}"
    '5.0%'
    """

    full_loss: float
    loss: float
    gradient_error: float

    @property
    def loss_increase(self) -> float:
        """Relative to the loss of the full base."""
        return self.loss / self.full_loss - 1


def measure_base(params: GPT, batches: Sequence[Batch], rank: int = 8) -> BaseMeasurement:
    """The loss of a base, quantized or not, and the gradient of a fresh LoRA over it. Blocks are recomputed in the
    backward pass.

    Args:
        params: The base, without adapters.
        batches: What both are measured on.
        rank: Of the LoRA.

    Raises:
        InputError: if no token has a weight.

    >>> import fgpt, torch
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, text = fgpt.init(config, fgpt.key(0)), torch.tensor([[1, 2, 3, 4]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3))
    >>> torch.allclose(measure_base(params, [batch], rank=2).loss, fgpt.loss(params, batch))
    True
    """
    adapters = lora(params, key(0), rank)
    weight = sum(float(batch.weights.sum()) for batch in batches)
    if not weight:
        raise InputError("the cost of a format is measured on text: give at least one token with a weight")

    def loss_share(a: Adapters, batch: Batch) -> Float[Tensor, ""]:
        return nll(adapt(params, a), batch, remat=True)[0] / weight

    loss, gradient = torch.zeros(()), dict[str, Tensor]()
    for batch in batches:
        grads, value = grad_and_value(loss_share)(adapters, batch)
        loss = loss + value.detach().cpu()
        for path, x in grads.items():
            assert isinstance(x, LoRA)
            gradient[path] = x.b + gradient.get(path, 0)
    return BaseMeasurement(loss, gradient)


def quantization_cost(full: BaseMeasurement, quantized: BaseMeasurement) -> QuantizationCost:
    """The cost of a format, of two measurements on the same batches.

    >>> import fgpt, torch
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, text = fgpt.init(config, fgpt.key(0)), torch.tensor([[1, 2, 3, 4]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 3))
    >>> full, small = (measure_base(p, [batch], rank=2) for p in (params, fgpt.quantize(params, "int8")))
    >>> 0.001 < quantization_cost(full, small).gradient_error < 0.1
    True
    """
    total = torch.stack([x.square().sum() for x in full.gradient.values()]).sum()
    error = torch.stack([(quantized.gradient[path] - x).square().sum() for path, x in full.gradient.items()]).sum()
    return QuantizationCost(float(full.loss), float(quantized.loss), float((error / total).sqrt()))
