"""Third derivatives and gradients by a weight of the loss."""

from typing import Any

import pytest
import torch
from builders import tiny, tokens, with_noise
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import fgpt
from fgpt.tree import astype, tree_map


def in_doubles(**shape: Any) -> tuple[fgpt.GPT, Any, Any]:
    """A model, adapters, and a direction."""
    p = astype(tree_map(lambda x: 0.5 * x, tiny(n_layer=1, **shape)), torch.float64)
    fresh = astype(fgpt.lora(p, fgpt.key(0), 2, target=r"blocks\..*"), torch.float64)
    at = with_noise(fresh, 0.1)
    return p, at, tree_map(torch.sub, with_noise(fresh, 0.1, 1), at)


def inner(a: Any, b: Any) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)]).sum()


@pytest.mark.parametrize("remat", [False, True])
def test_a_gradient_by_a_weight_of_the_loss(remat: bool):
    """Plain autograd follows the weight of a loss and nothing that the model is given: the slope, which is linear."""
    p, at, v = in_doubles()
    rows = tokens(31, 2, 9)

    def loss(a: Any) -> Tensor:
        return fgpt.loss(fgpt.adapt(p, a), fgpt.Batch(rows[:, :-1], rows[:, 1:], torch.ones(2, 8)), remat)

    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    slope = inner(torch.func.grad(lambda a: weight * loss(a))(at), v)
    (by_weight,) = torch.autograd.grad(slope, weight)
    assert by_weight.item() == pytest.approx(inner(torch.func.grad(loss)(at), v).item(), rel=1e-12)
    assert abs(by_weight.item()) > 1e-3


def test_a_third_derivative_by_recorded_backwards():
    """That of central differences of the second."""
    p, at, v = in_doubles()
    rows = tokens(31, 2, 9)
    batch = fgpt.Batch(rows[:, :-1], rows[:, 1:], torch.ones(2, 8))

    def along(t: Tensor) -> list[Tensor]:
        """The loss at at + t v, and its first three derivatives."""
        found = [fgpt.loss(fgpt.adapt(p, tree_map(lambda x, d: x + t * d, at, v)), batch)]
        for _ in range(3):
            found += torch.autograd.grad(found[-1], t, create_graph=True)
        return found

    def at_step(t: float) -> list[float]:
        return [x.item() for x in along(torch.tensor(t, dtype=torch.float64, requires_grad=True))]

    here, h = at_step(0.0), 1e-3
    ends = [at_step(s * h) for s in (-2, -1, 1, 2)]
    for i in range(3):
        y = [end[i] for end in ends]
        assert here[i + 1] == pytest.approx((y[0] - 8 * y[1] + 8 * y[2] - y[3]) / (12 * h), rel=1e-7)


def test_dual_numbers_by_hand_through_a_recorded_gradient_of_silu():
    """Forward over reverse, without torch.func: the Hessian's product of jvp(grad)."""
    p, at, v = in_doubles(activation="silu", gated_mlp=True)
    rows = tokens(31, 2, 9)

    def loss(a: Any) -> Tensor:
        return fgpt.loss(fgpt.adapt(p, a), fgpt.Batch(rows[:, :-1], rows[:, 1:], torch.ones(2, 8)))

    with forward_ad.dual_level():
        duals = tree_map(lambda x, d: forward_ad.make_dual(x.clone().requires_grad_(), d), at, v)
        grads = torch.autograd.grad(loss(duals), tree_leaves(duals))
        got = [forward_ad.unpack_dual(g).tangent for g in grads]
    expected = torch.func.jvp(torch.func.grad(loss), (at,), (v,))[1]
    for x, y in zip(got, tree_leaves(expected), strict=True):
        assert x is not None
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-9)
