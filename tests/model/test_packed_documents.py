"""Packed rows by the bounds of their documents are packed rows by segments, under every transform."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.data.examples import Example
from fgpt.data.packing import collate
from fgpt.kernels.documents import Documents
from fgpt.kernels.rotary import DynamicScaling
from fgpt.tree import astype, tree_leaves, tree_map

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "rotary, fewer heads of keys": {"n_head": 4, "n_kv": 2, "d_model": 32, "rotary_dim": 4},
    "a dynamic rope": {"rotary_dim": 4, "rope_scaling": DynamicScaling(2.0, 6)},
    "a window as long as a row": {"sliding_window": 20},
    "a short window": {"sliding_window": 4},
}


def packed(seq: int | None = 20) -> fgpt.Batch:
    """By bounds alone: whoever reads segments fails. Without padding in one row."""
    lengths = [[5, 7, 3], [9, 2], [18, 2]]
    rows = [[Example.completion(tuple(tokens(31, n, seed=n).tolist()), 1) for n in row] for row in lengths]
    return replace(collate(rows, seq), loss_positions=None, segments=None)


def by_segments(batch: fgpt.Batch) -> fgpt.Batch:
    """The same batch, which needs a mask."""
    assert batch.cu_seqlens is not None
    places = torch.arange(batch.tokens.shape[-1])
    segments = (places[:, None] >= batch.cu_seqlens[..., None, :]).sum(-1)
    return replace(batch, segments=segments, cu_seqlens=None)


def model(name: str) -> tuple[fgpt.GPT, Any]:
    params = astype(tiny(**MODELS[name]), torch.float64)
    adapters = fgpt.lora(params, fgpt.key(0), 2, target=r"blocks\..*\.(q|k|v|o)")
    return params, astype(with_noise(adapters, 0.1), torch.float64)


Losses = tuple[Callable[..., Tensor], Any]


@pytest.fixture(params=MODELS)
def losses(request: pytest.FixtureRequest) -> Losses:
    params, adapters = model(request.param)

    def loss(a: Any, b: fgpt.Batch, remat: bool = False) -> Tensor:
        return fgpt.nll(fgpt.adapt(params, a), b, remat)[0]

    return loss, adapters


def test_one_gradient(losses: Losses):
    loss, adapters = losses
    batch = packed()
    expected = grad(loss)(adapters, by_segments(batch))
    close(grad(loss)(adapters, batch), expected, 1e-10)
    for remat in (False, True):
        trained = tree_map(lambda x: x.clone().requires_grad_(), adapters)
        loss(trained, batch, remat).backward()
        close(tree_map(lambda x: x.grad, trained), expected, 1e-10)


def test_one_gradient_per_example(losses: Losses):
    loss, adapters = losses
    batch = packed()
    expected = vmap(grad(loss), (None, 0))(adapters, by_segments(batch))
    close(vmap(grad(loss), (None, 0))(adapters, batch), expected, 1e-10)
    of_sum = grad(lambda a: vmap(loss, (None, 0))(a, batch).sum())(adapters)
    close(of_sum, tree_map(lambda x: x.sum(0), expected), 1e-10)


def test_second_derivatives(losses: Losses):
    loss, adapters = losses
    batch = packed()
    direction = tree_map(lambda x: x - 0.1, adapters)
    forward, expected = (
        jvp(lambda a, b=b: grad(loss)(a, b), (adapters,), (direction,))[1] for b in (batch, by_segments(batch))
    )
    close(forward, expected, 1e-9)
    trained = tree_map(lambda x: x.clone().requires_grad_(), adapters)
    inputs = tree_leaves(trained)
    first = torch.autograd.grad(loss(trained, batch), inputs, create_graph=True)
    slope = torch.stack([(g * d).sum() for g, d in zip(first, tree_leaves(direction), strict=True)]).sum()
    close(list(torch.autograd.grad(slope, inputs)), tree_leaves(expected), 1e-9)


def test_bounds_that_are_not_those_of_the_row_are_refused():
    params, _ = model("rotary, fewer heads of keys")
    x = tokens(31, 1, 6)
    for bounds in ([0, 2, 5], [1, 6], [0, 4, 3, 6], [0, 7]):
        with pytest.raises(fgpt.InputError, match=r"^cu_seqlens of a row of 6 tokens ascend from 0 to 6: got \["):
            fgpt.hidden(params, x, cu_seqlens=torch.tensor([bounds], dtype=torch.int32))


WRONG_BOUNDS: dict[str, Any] = {
    "not from 0": [[1, 8], [0, 8]],
    "short": [[0, 3, 5], [0, 8, 8]],
    "long": [[0, 5, 9], [0, 8, 8]],
    "descending": [[0, 5, 3, 8], [0, 8, 8, 8]],
    "none": [[], []],
}


@pytest.mark.parametrize("bounds", WRONG_BOUNDS.values(), ids=WRONG_BOUNDS)
@pytest.mark.parametrize("name", ["gpt2", "a short window"])  # by bounds, and by a mask
def test_bounds_of_other_rows_are_refused(name: str, bounds: Any):
    """A mask takes any numbers."""
    params, adapters = model(name)
    text, cu_seqlens = tokens(31, 2, 8), torch.tensor(bounds, dtype=torch.int32)
    batch = fgpt.Batch(text, text, torch.ones(2, 8), cu_seqlens=cu_seqlens)

    def loss(a: Any) -> Tensor:
        return fgpt.nll(fgpt.adapt(params, a), batch)[0]

    for run in (lambda: loss(adapters), lambda: grad(loss)(adapters), lambda: jvp(loss, (adapters,), (adapters,))):
        with pytest.raises(fgpt.InputError, match="cu_seqlens"):
            run()


@pytest.mark.parametrize("bounds", [[[0, 3, 8]], [0, 3, 8]], ids=["of one row", "without rows"])
def test_bounds_of_fewer_rows_are_refused(bounds: Any):
    """Attention would leave the other rows unwritten. Whoever checks no types in `Batch` sees this message."""
    with pytest.raises(fgpt.InputError, match="two bounds or more for each row"):
        Documents(torch.tensor(bounds)).check(tokens(31, 2, 8))
