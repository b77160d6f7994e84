"""Second moments of a product y = x Wᵀ, collected while a loss is differentiated:

    inputs     Σ x xᵀ
    outputs    Σ ȳ ȳᵀ,  ȳ = ∂loss/∂y
    count      the number of rows with ȳ ≠ 0, which the sums are over

They come as the gradients of three tensors that change nothing else: of all products of a model in one backward pass,
with no more saved than x.

    reference     y itself
    fast path     none
    transforms    a first backward, and vmap over it. These gradients are sums, no derivatives
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.kernels.precision import at_least_fp32
from fgpt.tree import node


@node
class SecondMoments:
    """Tensors whose gradients are the second moments of a product; their values do not matter.

    Args:
        inputs: Of Σ x xᵀ.
        outputs: Of Σ ȳ ȳᵀ.
        count: Of the number of rows.
    """

    inputs: Float[Tensor, "in in"]
    outputs: Float[Tensor, "out out"]
    count: Float[Tensor, ""]


class _CollectMoments(torch.autograd.Function):
    """(y, x, inputs, outputs, count) -> y"""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor, inputs: Tensor, outputs: Tensor, count: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        rows, cotangents = at_least_fp32(x.flatten(0, -2)), at_least_fp32(g.flatten(0, -2))
        is_counted = (cotangents != 0).any(-1).to(rows.dtype)
        rows = is_counted[:, None] * rows
        return g, None, rows.T @ rows, cotangents.T @ cotangents, is_counted.sum()


def collect_moments(
    y: Float[Tensor, "*batch out"], x: Float[Tensor, "*batch in"], moments: SecondMoments
) -> Float[Tensor, "*batch out"]:
    """y, of which a backward pass gives the gradients of `moments`.

    >>> from torch.func import grad
    >>> w, x = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    >>> zeros = SecondMoments(torch.zeros(2, 2), torch.zeros(1, 1), torch.zeros(()))
    >>> moments = grad(lambda moments: 5 * collect_moments(x @ w.T, x, moments).sum())(zeros)
    >>> moments.inputs, moments.outputs, moments.count
    (tensor([[10.,  3.],
            [ 3.,  1.]]), tensor([[50.]]), tensor(2.))
    """
    return _CollectMoments.apply(y, x, moments.inputs, moments.outputs, moments.count)  # pyright: ignore[reportReturnType]
