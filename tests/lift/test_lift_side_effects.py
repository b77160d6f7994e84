"""A lifted module is left alone: by training, by errors, by BatchNorm and dropout."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import hf_gpt2, same, with_noise
from builders.lifted_modules import (
    MATRICES,
    Convolutions,
    TiedModule,
    X,
    assert_near,
    mean_loss,
    native_grads,
    with_random_params,
)
from torch import Tensor, nn
from torch.func import grad, vmap

import fgpt
from fgpt.tree import leaves


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in module.state_dict().items()}


def test_training_leaves_the_module_alone(tmp_path: Path):
    """Two steps: with B = 0 the first moves no A. The tree that is trained moves, and nothing else."""
    module: Any = hf_gpt2()
    module.transformer.h[0].requires_grad_(False)
    flags, before = [x.requires_grad for x in module.parameters()], snapshot(module)
    tensors = [id(x) for x in module.parameters()]
    params, apply = fgpt.from_module(module)
    adapters, optimizer = fgpt.lora(params, fgpt.key(0), 4, target=MATRICES), fgpt.adamw(1e-2)
    adapters |= fgpt.trainable_leaves(params, r".*ln_.*")

    def loss(adapters: Any, params: Any, batch: fgpt.Batch, rng: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = apply(fgpt.adapt(params, adapters), input_ids=batch.tokens).logits
        nll = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        return (nll * batch.weights.flatten()).sum(), batch.weights.sum()

    step, state, losses = fgpt.make_step(loss, optimizer), fgpt.init_state(adapters, optimizer), []
    for _ in range(3):
        state, metrics = step(state, params, [fgpt.Batch(X[:, :-1], X[:, 1:], torch.ones(3, 8))], None)
        losses.append(metrics.loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert all(not torch.equal(x, y) for x, y in zip(leaves(adapters).values(), leaves(state.trainable).values()))
    assert same(snapshot(module), before)
    assert [x.requires_grad for x in module.parameters()] == flags
    assert all(x.grad is None for x in module.parameters())
    assert [id(x) for x in module.parameters()] == tensors
    fgpt.save_adapters(state.trainable, tmp_path / "a.safetensors")
    reloaded = fgpt.load_adapters(tmp_path / "a.safetensors", params)
    assert torch.equal(
        apply(fgpt.adapt(params, reloaded), X).logits, apply(fgpt.adapt(params, state.trainable), X).logits
    )


def test_the_module_is_itself_again_after_an_error(gpt2: nn.Module):
    params, apply = fgpt.from_module(gpt2)
    before, tensors = snapshot(gpt2), [id(x) for x in gpt2.parameters()]
    with pytest.raises(IndexError):
        apply(with_noise(params), X + 31)
    assert same(snapshot(gpt2), before)
    assert [id(x) for x in gpt2.parameters()] == tensors


def test_a_module_under_two_names_is_itself_again():
    """Where torch's `tie_weights` leaves it with the tensors of the call."""
    module = with_random_params(TiedModule())
    before, tensors = snapshot(module), [id(x) for x in module.parameters()]
    params, apply = fgpt.from_module(module)
    grad(lambda p: apply(p, X).sum())(params)
    assert [id(x) for x in module.parameters()] == tensors
    assert same(snapshot(module), before)


def test_batchnorm_in_training_mode_updates_nothing():
    module = with_random_params(Convolutions()).train()
    before = snapshot(module)
    params, apply = fgpt.from_module(module)
    grads = grad(lambda a: mean_loss(lambda x: apply(fgpt.adapt(params, a), x)))(fgpt.trainable_leaves(params))
    out = apply(params, X)
    assert same(snapshot(module), before)
    assert_near(grads, native_grads(module, mean_loss))
    other = copy.deepcopy(module)
    assert torch.equal(out, other(X))
    assert not same(snapshot(other), before)  # torch's own call does update
    assert torch.equal(apply(params, X), out)
    with pytest.raises(RuntimeError, match="Batch norm got a batched tensor"):  # torch's word: one batch, one statistic
        vmap(lambda x: apply(params, x[None].expand(2, -1)))(X)


def test_a_buffer_is_read_as_it_stands():
    module = with_random_params(Convolutions())
    params, apply = fgpt.from_module(module)
    module.get_buffer("body.1.running_mean").add_(1.0)
    assert torch.equal(apply(params, X), module(X))
    module.train()
    torch.manual_seed(0)
    assert torch.equal(apply(params, X), copy.deepcopy(module)(X))


def test_dropout_in_training_mode_is_torchs():
    module = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    params, apply = fgpt.from_module(module)
    x = torch.ones(3, 4)
    torch.manual_seed(3)
    expected = module(x)
    torch.manual_seed(3)
    assert torch.equal(apply(params, x), expected)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: apply(params, x))(x)
    masks = [vmap(lambda x: apply(params, x), randomness=how)(x) == 0 for how in ("same", "different")]
    assert torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(masks[1][0], masks[1][1])
