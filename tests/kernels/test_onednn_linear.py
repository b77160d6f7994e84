"""oneDNN's product in place of MKL's: the same values and gradients, and where it is used."""

from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.kernels import onednn_linear as onednn
from fgpt.kernels.gemv import dense_linear
from fgpt.train_step import value_and_grad_once
from fgpt.tree import tree_leaves, tree_map

pytestmark = pytest.mark.skipif(not onednn.HAS_ONEDNN, reason="this CPU has no oneDNN product")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As on an AMD CPU, for matrices of any size. The shapes of the matrices that oneDNN multiplied."""
    monkeypatch.setattr(onednn, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(onednn, "USES_ONEDNN", True)
    shapes: list[tuple[int, ...]] = []
    product = onednn.onednn_product

    def record(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append(tuple(w.shape))
        return product(x, w, bias)

    monkeypatch.setattr(onednn, "onednn_product", record)
    return shapes


def operands(*batch: int) -> list[Tensor]:
    sizes = [(*batch, 12), (20, 12), (20,)]
    return [torch.randn(size, generator=fgpt.key(i)).requires_grad_() for i, size in enumerate(sizes)]


@pytest.mark.parametrize("batch", [(70,), (3, 30), (0,)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients(everywhere: list[Any], batch: tuple[int, ...], biased: bool):
    x, w, b = operands(*batch)
    y = dense_linear(x, w, b if biased else None)
    expected = torch.nn.functional.linear(x.double(), w.double(), b.double() if biased else None)
    close(y.double(), expected, 1e-5)
    u = torch.randn(y.shape, generator=fgpt.key(9))
    trained = (x, w, b) if biased else (x, w)
    got = torch.autograd.grad(y, trained, u)
    exact = torch.autograd.grad(expected, trained, u.double())
    close(got, exact, 1e-5)
    assert everywhere == [(20, 12), (12, 20)]  # y = x Wᵀ, and the gradient of x, whose matrix is Wᵀ


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", [fgpt.lora, fgpt.dora])
def test_gradients_that_autograd_maps_over(kind: Any):
    """Several cotangents of one graph (is_grads_batched), with a number of rows that oneDNN would fill up."""
    base = tiny()
    adapters = tree_map(lambda x: x.requires_grad_(), with_noise(kind(base, fgpt.key(0), 2)))
    y = fgpt.hidden(fgpt.adapt(base, adapters), tokens(31, 3, 7))
    cotangents, sources = torch.randn(4, *y.shape, generator=fgpt.key(1)), tree_leaves(adapters)
    got = torch.autograd.grad(y, sources, cotangents, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, sources, u, retain_graph=True) for u in cotangents]
    close(got, [torch.stack(xs) for xs in zip(*one_by_one, strict=True)], 1e-5)


def test_few_numbers_of_rows(everywhere: list[Any], monkeypatch: pytest.MonkeyPatch):
    """Each would be a kernel that oneDNN keeps."""
    rows: set[int] = set()
    product = onednn.onednn_product

    def record(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.add(x[..., 0].numel())
        return product(x, w, bias)

    monkeypatch.setattr(onednn, "onednn_product", record)
    for n in range(17, 1500, 11):
        x, w, _ = operands(n)
        y = dense_linear(x, w, None)
        close(y, torch.nn.functional.linear(x, w), 1e-5)
        assert not y._is_view()
        y.sum().backward()
    assert rows <= {*range(32, 513, 32), *range(640, 1537, 128)}


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_a_bias_of_any_strides(everywhere: list[Any], grad_enabled: bool):
    """oneDNN reads a bias as if its elements were side by side, beyond its memory too."""
    x, w, _ = operands(70)
    biases = [torch.randn(40)[::2], torch.randn(20, 3)[:, 1], torch.randn(1).expand(20)]
    with torch.set_grad_enabled(grad_enabled):
        for bias in biases:
            expected = torch.nn.functional.linear(x.double(), w.double(), bias.double())
            close(dense_linear(x, w, bias).double(), expected, 1e-5)
    assert len(everywhere) == len(biases)


def test_a_matrix_in_another_order_is_left_to_torch(everywhere: list[Any]):
    """For which oneDNN has a loop alone: seconds for a matrix of GPT-2."""
    x = torch.randn(70, 12)
    for w in (torch.randn(20, 24)[:, ::2], torch.randn(40, 12)[::2], torch.randn(1, 12).expand(20, 12)):
        for grad_enabled in (False, True):
            with torch.set_grad_enabled(grad_enabled):
                close(dense_linear(x, w), x @ w.T, 1e-5)
    assert not everywhere


def test_a_recorded_backward_is_differentiable(everywhere: list[Any]):
    def penalty(linear: Any, *xwb: Tensor) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(linear(*xwb).sin().sum(), xwb[0], create_graph=True)
        return torch.autograd.grad(g.square().sum(), xwb)

    fp32 = operands(5)
    got = penalty(dense_linear, *fp32)
    exact = penalty(torch.nn.functional.linear, *(x.detach().double().requires_grad_() for x in fp32))
    for g, e in zip(got, exact, strict=True):
        assert (g - e).abs().max() <= 1e-6 * e.abs().max()


def test_where_it_is_used(everywhere: list[Any]):
    w = torch.ones(6, 4)
    uses: list[bool] = []

    def record(x: Tensor) -> Tensor:
        uses.append(onednn.use_onednn(x, w))
        return x.sum()

    record(torch.ones(3, 4))
    with torch.no_grad():
        record(torch.ones(3, 4))
    assert uses == [True, True]
    uses.clear()
    record(torch.ones(3, 4, dtype=torch.bfloat16))
    vmap(record)(torch.ones(2, 3, 4))
    grad(record)(torch.ones(3, 4))
    jvp(record, (torch.ones(3, 4),), (torch.ones(3, 4),))
    assert uses == [False] * 4


@pytest.mark.parametrize("remat", [False, True], ids=["saved", "remat"])
@pytest.mark.parametrize("kind", ["lora", "dora", "head", "int8", "nf4"])
def test_a_training_step(everywhere: list[Any], kind: str, remat: bool):
    """The gradient of a step by oneDNN is that of torch.func.grad, whose products are torch's."""
    params, text = tiny(d_model=64, d_mlp=128, tie_word_embeddings=False), tokens(31, 2, 9)
    batch = fgpt.Batch(text, text.roll(1, 1), torch.ones(2, 9))
    target = r"blocks\..*\.(q|v|up)"
    adapters: Any = fgpt.dora(params, fgpt.key(0), 2, target=target) if kind == "dora" else None
    adapters = adapters or fgpt.lora(params, fgpt.key(0), 2, target="head" if kind == "head" else target)
    if kind in ("int8", "nf4"):
        params = fgpt.quantize(params, kind)

    def loss(a: Any) -> tuple[Tensor, Tensor]:
        return fgpt.nll(fgpt.adapt(params, a), batch, remat=remat)

    got, _ = value_and_grad_once(loss, adapters)
    assert everywhere
    everywhere.clear()
    expected = grad(lambda a: loss(a)[0])(adapters)
    close(got, expected, 1e-4 if kind in ("int8", "nf4") else 1e-5)
