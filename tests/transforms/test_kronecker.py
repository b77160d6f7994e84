"""Kronecker factors equal second moments by hand, by plain autograd, and by hooks on transformers' GPT-2."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import close, hf_gpt2, load_hf_model, tiny, tokens, with_noise
from torch import Tensor
from torch.func import grad, vmap

import fgpt
from fgpt.kernels.second_moments import SecondMoments, collect_moments
from fgpt.model import Linear
from fgpt.transforms.curvature import ggn_operator, to_matrix
from fgpt.transforms.kronecker import kronecker_factors
from fgpt.tree import astype, ravel, tree_map


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=fgpt.key(seed), dtype=torch.float64)


def test_of_one_position_they_are_the_product_of_gradients():
    base = {"layer": Linear(random(3, 4), random(3, seed=1))}
    adapters: Any = {"layer": fgpt.LoRA(random(2, 4, seed=2), random(3, 2, seed=3), alpha=3.0)}

    def loss(a: Any) -> Tensor:
        layer = fgpt.adapt(base, a)["layer"]
        return fgpt.linear(random(1, 4, seed=4), layer.w, layer.b).sin().sum()

    factors = kronecker_factors(loss, adapters)["layer"]
    gradient = grad(loss)(adapters)["layer"]
    for pair, g in ((factors.a, gradient.a), (factors.b, gradient.b)):
        close(torch.kron(pair.outputs, pair.inputs), torch.outer(g.flatten(), g.flatten()), 1e-12)


def test_of_two_layers_by_plain_autograd():
    """Rows that the loss does not depend on are no rows: here the last."""
    base = {"up": Linear(random(5, 4)), "down": Linear(random(3, 5, seed=1))}
    adapters: Any = {
        "up": fgpt.LoRA(random(2, 4, seed=2), random(5, 2, seed=3), alpha=3.0),
        "down": fgpt.LoRA(random(1, 5, seed=4), random(3, 1, seed=5), alpha=2.0, rs=True),
    }
    x, weights = random(2, 3, 4, seed=6), torch.tensor([[1.0, 2.0, 0.5], [1.0, 3.0, 0.0]]).double()

    def loss(a: Any) -> Tensor:
        layers = fgpt.adapt(base, a)
        inner = fgpt.linear(x, layers["up"].w).tanh()
        return (weights[..., None] * fgpt.linear(inner, layers["down"].w).sin()).sum()

    factors = kronecker_factors(loss, adapters)

    def product(name: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
        lora = adapters[name]
        low = (lora.scale * inputs @ lora.a.T).requires_grad_()
        low.retain_grad()
        output = inputs @ base[name].w.T + low @ lora.b.T
        output.retain_grad()
        return low, output

    rows = x.view(6, 4).clone().requires_grad_()
    low_up, up = product("up", rows)
    inner = up.tanh()
    low_down, down = product("down", inner)
    (weights.view(6, 1) * down.sin()).sum().backward()
    for name, inputs, low, output in (("up", rows, low_up, up), ("down", inner, low_down, down)):
        assert low.grad is not None
        assert output.grad is not None
        assert factors[name].num_positions == 5
        close(factors[name].a.inputs, inputs[:5].T @ inputs[:5] / 5, 1e-12)
        close(factors[name].a.outputs, adapters[name].scale ** 2 * low.grad.T @ low.grad, 1e-12)
        close(factors[name].b.inputs, low[:5].T @ low[:5] / 5, 1e-12)
        close(factors[name].b.outputs, output.grad.T @ output.grad, 1e-12)


LAYERS = {
    "attn.q": ("attn.c_attn", slice(0, 16)),
    "attn.v": ("attn.c_attn", slice(32, 48)),
    "attn.o": ("attn.c_proj", slice(None)),
    "mlp.up": ("mlp.c_fc", slice(None)),
    "mlp.down": ("mlp.c_proj", slice(None)),
}


def test_of_gpt2_by_hooks_on_transformers(tmp_path: Path):
    model = hf_gpt2()
    base = load_hf_model(model, tmp_path)
    adapters = fgpt.lora(base, fgpt.key(0), 2)
    text = tokens(31, 3, 9)
    batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.rand(3, 8, generator=fgpt.key(1)))
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name in (name for name in modules if name.endswith(("c_attn", "c_proj", "c_fc"))):
        module = modules[name]
        module.register_forward_hook(lambda m, x, y, n=name: inputs.update({n: x[0]}))
        module.register_full_backward_hook(lambda m, dx, dy, n=name: outputs.update({n: dy[0]}))
    nll = F.cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    (batch.weights.flatten() * nll).sum().backward()
    for remat in (False, True):
        factors = kronecker_factors(lambda a, r=remat: fgpt.nll(fgpt.adapt(base, a), batch, r)[0], adapters)
        for path, (pair, _, _) in factors.items():
            _, number, layer = path.split(".", 2)
            module, part = LAYERS.get(layer, ("attn.c_attn", slice(16, 32)))
            x = inputs[f"transformer.h.{number}.{module}"].flatten(0, 1)
            g = outputs[f"transformer.h.{number}.{module}"].flatten(0, 1)[:, part]
            close(factors[path].b.outputs, g.T @ g, 1e-3, 1e-3)
            if layer != "attn.q":  # the first query has one key: its gradient is 0 up to rounding
                close(pair.inputs, x.T @ x / len(x), 1e-4, 1e-4)
    assert len(factors) == 12


def test_positions_without_a_loss_are_left_out_wherever_it_is_computed():
    base = tiny()
    adapters = with_noise(fgpt.lora(base, fgpt.key(0), 2, target=r".*\.(up|down|o)"), 0.1)
    text, weights = tokens(31, 2, 9), torch.ones(2, 8)
    weights[:, :3], weights[1, 6:] = 0.0, 0.0
    everywhere = fgpt.Batch(text[:, :-1], text[:, 1:], weights)
    selected = fgpt.Batch(text[:, :-1], text[:, 1:], weights, loss_positions=weights.flatten().nonzero().flatten())
    got, expected = (kronecker_factors(lambda a, b=b: loss(a, base, b), adapters) for b in (selected, everywhere))
    close(got, expected, 1e-4, 1e-4)


def loss(adapters: Any, base: Any, batch: fgpt.Batch) -> Tensor:
    return fgpt.nll(fgpt.adapt(base, adapters), batch)[0]


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_over_quantized_bases(to: Any):
    """Those over the same values; of int8, which rounds its inputs, within 10 %."""
    base = fgpt.quantize(tiny(d_model=64, d_mlp=64), to)
    text = tokens(31, 2, 9)
    batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(2, 8))
    adapters = with_noise(fgpt.lora(base, fgpt.key(0), 2, target=r".*\.(v|up)"), 0.05)
    dequantized = fgpt.merge(base, base="dequantized")
    got, expected = (
        ravel(kronecker_factors(lambda a, p=p: loss(a, p, batch), adapters))[0] for p in (base, dequantized)
    )
    assert float((got - expected).norm() / expected.norm()) < (0.1 if to == "int8" else 1e-5)


def test_of_a_root_of_the_labels_covariance_they_are_those_of_the_fisher_matrix():
    """Of one position exactly: of the Gauss-Newton matrix of the cross-entropy. `fisher_sample` draws such u."""
    base = astype(tree_map(lambda x: 0.5 * x, tiny(n_layer=1, vocab_size=5)), torch.float64)
    adapters = with_noise(astype(fgpt.lora(base, fgpt.key(0), 1, target=r".*\.down"), torch.float64), 0.2)

    def logits(a: Any) -> Tensor:
        return fgpt.apply(fgpt.adapt(base, a), torch.tensor([[3]])).flatten(0, 1)

    exact = to_matrix(ggn_operator(logits, lambda z: F.cross_entropy(z, torch.tensor([1])), adapters), adapters)
    z = logits(adapters)
    p = z[0].softmax(-1)
    root = p.sqrt().diag() - torch.outer(p, p.sqrt())
    close(root @ root.T, p.diag() - torch.outer(p, p), 1e-12)
    parts = [kronecker_factors(lambda a, u=u: (u * logits(a)).sum(), adapters) for u in root.T]
    factors = [part["blocks.0.mlp.down"].b for part in parts]
    close(torch.kron(sum(x.outputs for x in factors), factors[0].inputs), exact[40:, 40:], 1e-12)


def test_collected_under_vmap():
    """Of each example, as its gradient is."""
    x, w = random(4, 3, 2), random(5, 2, seed=1)

    def moments(x: Tensor) -> SecondMoments:
        zeros = SecondMoments(*(torch.zeros(size).double() for size in ((2, 2), (5, 5), ())))
        return grad(lambda m: collect_moments(x @ w.T, x, m).sin().sum())(zeros)

    got = vmap(moments)(x)
    for i in range(4):
        close(tree_map(lambda y, i=i: y[i], got), moments(x[i]), 1e-12)
    close(got.outputs[1], (x[1] @ w.T).cos().T @ (x[1] @ w.T).cos(), 1e-12)


def test_what_has_no_factors():
    base = tiny()
    text = tokens(31, 1, 9)
    batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(1, 8))
    dropout = fgpt.lora(base, fgpt.key(0), 2, dropout=0.5)
    for adapters, says in (
        (fgpt.dora(base, fgpt.key(0), 2), "blocks.0.attn.q: expected a LoRA, got a DoRA"),
        (fgpt.lora(base, fgpt.key(0), 2, target="wte"), "wte: the loss depends on no product"),
    ):
        with pytest.raises(fgpt.InputError, match=says):
            kronecker_factors(lambda a: loss(a, base, batch), adapters)
    with pytest.raises(fgpt.InputError, match="its dropout is on"):
        kronecker_factors(lambda a: fgpt.nll(fgpt.adapt(base, a, rng=fgpt.key(0)), batch)[0], dropout)
    biases = fgpt.trainable_leaves(base, r".*\.b")
    assert len(kronecker_factors(lambda a: loss(a, base, batch), dropout | biases)) == 12
