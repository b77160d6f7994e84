"""Gradients of norms and embeddings are not summed in half precision."""

import pytest
import torch
from builders import tokens
from torch import Tensor
from torch.nn import functional as F

import fgpt
from fgpt import model as M
from fgpt.model import forward

# -------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_gradients_of_a_norm_are_not_summed_in_half_precision(kind: str, dtype: torch.dtype):
    rng = fgpt.key(0)
    x, g = (torch.randn(4096, 16, generator=rng).to(dtype) for _ in range(2))
    w, b = torch.rand(16, generator=rng).to(dtype), torch.randn(16, generator=rng).to(dtype)

    def total(wb: tuple[Tensor, Tensor], x: Tensor, g: Tensor) -> Tensor:
        p = M.Norm(*wb) if kind == "layer" else M.RMSNorm(wb[0])
        return (forward.norm(x, p, 1e-5).to(torch.float64) * g.to(torch.float64)).sum()

    plain = (w.clone().requires_grad_(), b.clone().requires_grad_())
    y = x.double() - x.double().mean(-1, keepdim=True) if kind == "layer" else x.double()
    y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    true = (g.double() * y).sum(0), g.double().sum(0) * (kind == "layer")
    halves = (x.unflatten(0, (2, -1)), g.unflatten(0, (2, -1)))
    for found in (
        torch.autograd.grad(total(plain, x, g), plain, materialize_grads=True),
        torch.func.grad(total)((w, b), x, g),
        [t.double().sum(0) for t in torch.func.vmap(torch.func.grad(total), in_dims=(None, 0, 0))((w, b), *halves)],
    ):
        for got, expected in zip(found, true, strict=True):
            assert (got.double() - expected).norm() <= 5e-3 * expected.norm()


# --------------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradients_of_an_embedding_are_not_summed_in_half_precision(dtype: torch.dtype):
    """Of three tokens that stand at 4,096 places, with the values that torch's own reading has."""
    table, g = (
        torch.randn(5, 16, generator=fgpt.key(0)).to(dtype),
        torch.rand(4096, 16, generator=fgpt.key(1)).to(dtype),
    )
    text = tokens(3, 4096)
    true = F.one_hot(text, 5).double().T @ g.double()

    def total(table: Tensor, text: Tensor, g: Tensor) -> Tensor:
        return (fgpt.embed(text, table).double() * g.double()).sum()

    trained = table.clone().requires_grad_()
    assert torch.equal(fgpt.embed(text.view(2, -1), trained), F.embedding(text.view(2, -1), table))
    halves = (text.view(2, -1), g.unflatten(0, (2, -1)))
    for got in (
        torch.autograd.grad(total(trained, text, g), trained)[0],
        torch.func.grad(total)(table, text, g),
        torch.func.vmap(torch.func.grad(total), in_dims=(None, 0, 0))(table, *halves).double().sum(0),
    ):
        assert (got.double() - true).norm() <= 5e-3 * true.norm()
