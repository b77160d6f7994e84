"""Gradients of each example equal those of a loop, whatever lengths, chunks and transforms; what follows from them by
hand.
"""

from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

import fgpt
from fgpt.losses import Batch
from fgpt.transforms.per_example import (
    gradient_noise_scale,
    gradient_similarity,
    per_example_grads,
    per_example_norms,
)
from fgpt.tree import leaves, tree_leaves, tree_map

BASE = tiny()
ADAPTERS = with_noise(fgpt.lora(BASE, fgpt.key(0), 2), 0.1)


def example(width: int, seed: int) -> Batch:
    text = tokens(31, 1, width + 1, seed=seed)
    weights = torch.rand(1, width, generator=fgpt.key(seed))
    weights[:, 0] = 0.0
    positions = torch.arange(1, width) if seed % 2 else None
    return Batch(text[:, :-1], text[:, 1:], weights, loss_positions=positions)


def loss_over(base: Any) -> Any:
    return lambda adapters, row: fgpt.nll(fgpt.adapt(base, adapters), row)[0]


def loop(loss: Any, params: Any, examples: list[Batch]) -> Any:
    return tree_map(lambda *xs: torch.stack(xs), *(grad(loss)(params, row) for row in examples))


@pytest.mark.slow
@settings(max_examples=15)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=7), st.sampled_from([None, 1, 2, 5]))
def test_they_are_those_of_a_loop(widths: list[int], chunk_size: int | None):
    examples = [example(width, i) for i, width in enumerate(widths)]
    loss = loss_over(BASE)
    result = per_example_grads(loss, ADAPTERS, examples, chunk_size=chunk_size)
    expected = loop(loss, ADAPTERS, examples)
    close(result.grads, expected, 1e-4)
    close(result.losses, torch.stack([loss(ADAPTERS, row) for row in examples]), 1e-4)
    norms = torch.stack([x.flatten(1).square().sum(1) for x in tree_leaves(expected)]).sum(0).sqrt()
    close(per_example_norms(loss, ADAPTERS, examples, chunk_size=chunk_size), norms, 1e-4)


@pytest.mark.parametrize("to", ["nf4", "int8", "blockwise8"])
def test_over_quantized_bases(to: Any):
    base = fgpt.quantize(tiny(d_model=64, d_mlp=64), to)
    adapters = with_noise(fgpt.dora(base, fgpt.key(0), 2), 0.05)
    examples = [example(width, i) for i, width in enumerate((4, 9, 9))]
    got = per_example_grads(loss_over(base), adapters, examples).grads
    expected = loop(loss_over(base), adapters, examples)
    far = [float((x - y).norm() / y.norm().clamp(min=1e-3)) for x, y in zip(tree_leaves(got), tree_leaves(expected))]
    assert max(far) < (5e-2 if to == "int8" else 1e-4)  # int8 rounds its inputs, which may differ by a bit


def test_under_a_transform_and_differentiated():
    """Of an ensemble, and the norm's own gradient by plain autograd."""
    examples = [example(width, i) for i, width in enumerate((4, 4))]
    many = [with_noise(ADAPTERS, 0.1, seed) for seed in range(2)]
    stacked = tree_map(lambda *xs: torch.stack(xs), *many)
    got = vmap(lambda a: per_example_grads(loss_over(BASE), a, examples).grads)(stacked)
    for i, adapters in enumerate(many):
        close(tree_map(lambda x, i=i: x[i], got), loop(loss_over(BASE), adapters, examples), 1e-4)

    def total(adapters: Any) -> Tensor:
        return per_example_norms(loss_over(BASE), adapters, examples).sum()

    inputs = tree_map(lambda x: x.clone().requires_grad_(), ADAPTERS)
    second = torch.autograd.grad(total(inputs), tree_leaves(inputs))
    direction = with_noise(tree_map(torch.zeros_like, ADAPTERS), 1.0)
    slope = sum(float((x * y).sum()) for x, y in zip(second, tree_leaves(direction), strict=True))
    h = 1e-3
    ends = [float(total(tree_map(lambda x, d, s=s: x + s * h * d, ADAPTERS, direction))) for s in (1, -1)]
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=2e-2)


def vectors(*rows: tuple[float, ...]) -> list[Batch]:
    """Examples whose loss is a dot product with these vectors, which are thus their gradients."""
    return [
        Batch(torch.zeros(1, len(r)).long(), torch.zeros(1, len(r)).long(), torch.tensor([r]).float()) for r in rows
    ]


def dot(params: Any, row: Batch) -> Tensor:
    return (params["w"] * row.weights).sum()


def test_the_noise_scale_by_hand():
    """Of the gradients (1, 0), (3, 0), (2, 1), (2, -1): their mean is (2, 0), their variances 2/3 and 2/3."""
    got = gradient_noise_scale(dot, {"w": torch.zeros(1, 2)}, vectors((1, 0), (3, 0), (2, 1), (2, -1)), chunk_size=3)
    noise = 2 / 3 + 2 / 3
    signal = 4 - noise / 4
    close(torch.stack(list(got)), torch.tensor([noise / signal, signal, noise]), 1e-6)


def test_its_estimates_are_unbiased():
    rng = fgpt.key(0)
    mean, results = torch.tensor([1.0, 2.0]), []
    for _ in range(300):
        rows = mean + torch.randn(4, 2, generator=rng) * torch.tensor([1.0, 2.0])
        results.append(gradient_noise_scale(dot, {"w": torch.zeros(1, 2)}, vectors(*map(tuple, rows.tolist()))))
    assert float(torch.stack([x.signal for x in results]).mean()) == pytest.approx(5.0, rel=0.1)
    assert float(torch.stack([x.noise for x in results]).mean()) == pytest.approx(5.0, rel=0.1)


def test_similarity_finds_the_rows_of_a_task():
    """By hand, and on a model: a row is most similar to itself."""
    got = gradient_similarity(dot, {"w": torch.zeros(1, 2)}, vectors((1, 0), (0, 0), (3, 4)), vectors((2, 0), (0, -1)))
    close(got, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.6, -0.8]]), 1e-6)
    rows = [example(width, i) for i, width in enumerate((6, 9, 7, 11))]
    own = gradient_similarity(loss_over(BASE), ADAPTERS, rows, rows, chunk_size=2)
    close(own.diagonal(), torch.ones(4), 1e-5)
    assert (own.argmax(0) == torch.arange(4)).all()


def test_what_cannot_be_computed():
    for call, says in (
        (lambda: per_example_grads(dot, {"w": torch.zeros(1, 2)}, []), "no examples"),
        (lambda: per_example_norms(dot, {"w": torch.zeros(1, 2)}, vectors((1, 0)), chunk_size=0), "chunk_size is 0"),
        (lambda: gradient_noise_scale(dot, {"w": torch.zeros(1, 2)}, vectors((1, 0))), "two or more"),
    ):
        with pytest.raises(fgpt.InputError, match=says):
            call()


def test_no_more_gradients_are_held_than_those_of_a_chunk():
    from builders import LargestTensor

    examples = [example(6, i) for i in range(16)]
    with LargestTensor() as largest:
        per_example_norms(loss_over(BASE), ADAPTERS, examples, chunk_size=2)
    leading = [shape[0] for shape in largest.shapes if shape[1:] in {tuple(x.shape) for x in leaves(ADAPTERS).values()}]
    assert leading
    assert max(leading) == 2
