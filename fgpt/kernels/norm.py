"""LayerNorm and RMSNorm over the last axis, with statistics in fp32, or in fp64 if x is in fp64:

    layer_norm   y = (x - mean x) / √(var x + eps) ⊙ w + b
    rms_norm     y = x / √(mean x² + eps) ⊙ w

RMSNorm is its definition, in plain torch. LayerNorm's `reference` is the definition, too, and its fast path is torch's
kernel, under grad, vmap and both in either order.

torch's kernel of LayerNorm is wrong in three places, where something else stands in:

    second derivatives   under jvp of jvp, and under jacrev of jacrev and hessian if w is differentiated: several
                         per cent off, without a warning. The reference is used.
    third derivatives    the kernel's are wrong as well: a backward that is recorded is the reference's.
    bf16 on a CPU        gradients of w and b are summed in the dtype of x: 5 % off over 4,096 tokens. If they are
                         trained, x is in fp32 inside the kernel.

Source: Ba et al. 2016 (LayerNorm), section 3.1; Zhang and Sennrich 2019 (RMSNorm), equation 4; pytorch issue 196700.
"""

from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.functorch_state import is_differentiated, needs_higher_order
from fgpt.kernels.precision import accumulates_in_half, at_least_fp32
from fgpt.kernels.recordable import with_every_derivative


def rms_norm(x: Float[Tensor, "*batch d"], w: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*batch d"]:
    """x / √(mean x² + eps) ⊙ w: the definition itself."""
    y = at_least_fp32(x)
    return (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * w


def reference(
    x: Float[Tensor, "*batch d"], w: Float[Tensor, " d"], b: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "*batch d"]:
    """The definition of `layer_norm`: RMSNorm of the centered x."""
    y = at_least_fp32(x)
    y = y - y.mean(-1, keepdim=True)
    y = (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * w
    return y if b is None else y + b


def layer_norm(
    x: Float[Tensor, "*batch d"], w: Float[Tensor, " d"], b: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "*batch d"]:
    """(x - mean x) / √(var x + eps) ⊙ w + b; right under every transform.

    Args:
        x: The input.
        w: The gain, in the dtype of x.
        b: The bias, in the dtype of x; None adds none.
        eps: Added to the variance.
    """
    definition = partial(reference, eps=eps)
    if needs_higher_order(x, w, b):
        return definition(x, w, b)
    if accumulates_in_half(x) and is_differentiated(w, b):
        y = F.layer_norm(x.float(), x.shape[-1:], w.float(), None if b is None else b.float(), eps).to(x.dtype)
    else:
        y = F.layer_norm(x, x.shape[-1:], w, b, eps)
    return with_every_derivative(definition, y, x, w, b, second=True)
