"""Merging by gradient finds what each layer needs of each set, and every set's kind and base will do."""

from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise

import fgpt
from fgpt.adapter_combining import task_vector
from fgpt.gradient_merging import merge_by_gradient
from fgpt.tree import leaves

BASE: Any = tiny()
LAYERS = r"blocks\..*\.(q|v|up|down)"


def rows_of(params: Any, seed: int) -> fgpt.Batch:
    """Rows with the most likely next token of a model at each position: what it knows."""
    text = tokens(31, 8, 12, seed=seed)
    return fgpt.Batch(text, fgpt.apply(params, text).argmax(-1), torch.ones(8, 12))


def mean_loss(params: Any, batch: fgpt.Batch) -> float:
    total, weight = fgpt.nll(params, batch)
    return float(total / weight)


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "dora"), ("ia3", "leaves")])
def test_it_takes_of_each_set_what_the_rows_need(kinds: tuple[str, str]):
    """The rows are those of the first set alone: its coefficients grow, and the loss falls below that of the soup."""
    makers = {
        "lora": lambda seed: fgpt.lora(BASE, fgpt.key(seed), 2, target=LAYERS),
        "dora": lambda seed: fgpt.dora(BASE, fgpt.key(seed), 2, target=LAYERS),
        "ia3": lambda _: fgpt.ia3(BASE),
        "leaves": lambda _: fgpt.trainable_leaves(BASE, r".*ln_.*"),
    }
    sets = [with_noise(makers[kind](i), 0.3, seed=i) for i, kind in enumerate(kinds, 1)]
    batch = rows_of(fgpt.adapt(BASE, sets[0]), seed=5)
    merged = merge_by_gradient(BASE, sets, [[batch]] * 40)
    soup, own = (fgpt.adapt(BASE, x) for x in (fgpt.combine(BASE, sets), merged.adapters))
    assert mean_loss(own, batch) < mean_loss(soup, batch)
    close(merged.losses[0], torch.tensor(mean_loss(soup, batch)), 1e-5)
    assert bool((merged.losses[1:] < merged.losses[0]).all())
    both = [path for path in sets[0] if path in sets[1]]
    if both:
        assert sum(float(merged.weights[path][0] - merged.weights[path][1]) for path in both) > 0


def test_its_adapters_are_the_combination_by_its_weights():
    sets = [with_noise(fgpt.lora(BASE, fgpt.key(i), i, target=LAYERS), seed=i) for i in (1, 2)]
    merged = merge_by_gradient(BASE, sets, [[rows_of(BASE, 1), rows_of(BASE, 2)]] * 3)
    vectors, found = [task_vector(BASE, x) for x in sets], task_vector(BASE, merged.adapters)
    for path in found:
        w = merged.weights[path.removesuffix(".w")]
        close(found[path], w[0] * vectors[0][path] + w[1] * vectors[1][path], 1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantized_base(kind: Any):
    base = fgpt.quantize(tiny(d_model=64, d_mlp=64), kind)
    sets = [with_noise(fgpt.lora(base, fgpt.key(i), 2, target=LAYERS), 0.3, seed=i) for i in (1, 2)]
    merged = merge_by_gradient(base, sets, [[rows_of(fgpt.adapt(base, sets[1]), 3)]] * 10)
    assert float(merged.losses[-1]) < float(merged.losses[0])
    assert all(type(x) is fgpt.LoRA for x in merged.adapters.values())
    assert not any(x.requires_grad for x in leaves(merged.adapters).values())


def test_what_cannot_be_merged():
    one = fgpt.lora(BASE, fgpt.key(0), 2)
    with pytest.raises(fgpt.InputError, match="two sets of adapters or more, got 1"):
        merge_by_gradient(BASE, [one], [[rows_of(BASE, 1)]])
    with pytest.raises(fgpt.InputError, match="no batches to learn from"):
        merge_by_gradient(BASE, [one, one], [])
