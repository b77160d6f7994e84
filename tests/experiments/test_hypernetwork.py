"""The example of a hypernetwork: one vmap is the loop over examples, gradient included, over any base."""

from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise

import fgpt
from experiments.research import hypernetwork as H
from fgpt.tree import get_at, tree_leaves, tree_map, unflatten_like

SIZE = H.TINY._replace(members=3, rank=2)
TEXT = tokens(31, 4, 9)
BATCH = fgpt.Batch(TEXT[:, :-1], TEXT[:, 1:], torch.arange(8).ge(torch.tensor([[2], [3], [4], [5]])).float())


def loop(network: H.Hypernetwork, base: Any) -> Any:
    """Each row by a merged sum of the bank's LoRAs, with the embedding's mean taken over the prompt's tokens alone."""
    total = torch.tensor(0.0)
    for i, length in enumerate((2, 3, 4, 5)):
        e = fgpt.dense(base.wte.w)[BATCH.tokens[i, :length]].mean(0)
        c = 3 * (network.weight @ (e / e.square().mean().sqrt())).softmax(-1)
        changes: Any = {}
        for path, x in network.bank.items():
            a, b = x.a.view(3, 2, -1), x.b.view(len(x.b), 3, 2)
            scale = x.alpha / 6
            change = sum(c[j] * scale * b[:, j] @ a[j] for j in range(3))
            layer = get_at(base, path)
            changes[f"{path}.w"] = fgpt.dense(layer.w) + change
        plain = fgpt.merge(base, base="dequantized")
        row: Any = tree_map(lambda x, i=i: x[i], BATCH)
        total = total + fgpt.nll(fgpt.adapt(plain, changes), row)[0]
    return total


@pytest.mark.parametrize("to", [None, "nf4"])
def test_one_vmap_is_the_loop(to: Any):
    base: Any = tiny(d_model=64, d_mlp=64)
    base = base if to is None else fgpt.quantize(base, to)
    network = with_noise(H.build(base, SIZE, seed=0), 0.1)
    inputs = tree_map(lambda x: x.clone().requires_grad_(), network)
    expected = loop(inputs, base)
    slopes = unflatten_like(network, torch.autograd.grad(expected, tree_leaves(inputs)))
    sgd = fgpt.Optimizer(lambda params: (), lambda g, s, params: (tree_map(torch.sub, params, g), s))
    step = fgpt.make_step(H.hypernetwork_loss, sgd, max_norm=None)
    state, metrics = step(fgpt.init_state(network, sgd), base, [BATCH], None)
    weight = float(BATCH.weights.sum())
    assert float(metrics.loss) == pytest.approx(float(expected.detach()) / weight, rel=1e-5)
    close(tree_map(torch.sub, network, state.trainable), tree_map(lambda g: g / weight, slopes), 2e-5)
    assert float(slopes.weight.abs().max()) > 1e-3


def test_it_begins_as_the_bank_itself():
    base = tiny(d_model=64)
    network = H.build(base, SIZE, seed=0)
    bank = with_noise(network.bank, 0.1)
    values = H.hypernetwork_loss(H.Hypernetwork(bank, network.weight), base, BATCH, None)
    close(values, H.shared_loss(bank, base, BATCH, None), 1e-4)


@pytest.mark.slow
def test_the_tiny_form_prints_both_sides(capsys: pytest.CaptureFixture[str]):
    results = H.main(["--tiny"])
    assert all(x.after < x.before for each in results.values() for x in each)
    one, network = capsys.readouterr().out.splitlines()
    assert one.startswith("seed 0, one LoRA: ")
    assert network.startswith("seed 0, hypernetwork: ")
