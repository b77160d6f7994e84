"""transformers' GPT-2, lifted: values, gradients, adapters as on our own."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from builders import load_hf_model, same, stack_trees, with_noise
from builders.lifted_modules import FRESH, MATRICES, X, assert_near, gpt2_loss, lifted_loss, native_grads, path_of
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.layers import weight_matrices
from fgpt.tree import leaves, num_elements, tree_map


def test_gpt2_lifted_is_gpt2_to_the_bit(gpt2: nn.Module):
    params, apply = fgpt.from_module(gpt2)
    assert torch.equal(apply(params, input_ids=X).logits, gpt2(input_ids=X).logits)
    assert torch.equal(apply(params, X)[0], gpt2(X)[0])
    assert set(leaves(params)) == {path_of(gpt2, name) for name, _ in gpt2.named_parameters()}
    assert num_elements(params) == sum(x.numel() for x in gpt2.parameters())
    assert {x.untyped_storage().data_ptr() for x in leaves(params).values()} == {
        x.untyped_storage().data_ptr() for x in gpt2.parameters()
    }
    assert not any(x.requires_grad for x in leaves(params).values())
    assert weight_matrices(params)["transformer.h.1.mlp.c_fc"].shape == (64, 16)  # [out, in]


def test_every_gradient_of_gpt2_is_its_own(gpt2: nn.Module):
    params, apply = fgpt.from_module(gpt2)
    grads = grad(lifted_loss(params, apply))(fgpt.trainable_leaves(params))
    assert_near(grads, native_grads(gpt2, gpt2_loss), 1e-6)


@pytest.mark.parametrize("method", FRESH)
def test_fresh_adapters_change_no_bit_and_merge_to_the_params(gpt2: nn.Module, method: str):
    params, apply = fgpt.from_module(gpt2)
    adapted = fgpt.adapt(params, FRESH[method](params, MATRICES))
    assert torch.equal(apply(adapted, X).logits, gpt2(X).logits)
    assert same(fgpt.merge(adapted), params)
    moved = fgpt.adapt(params, with_noise(FRESH[method](params, MATRICES)))
    assert torch.equal(apply(fgpt.merge(moved), X).logits, apply(moved, X).logits)
    assert not torch.allclose(apply(moved, X).logits, gpt2(X).logits, atol=1e-2)


NAMES = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}


@pytest.mark.parametrize("method", FRESH)
def test_adapters_on_gpt2_are_those_on_our_own(gpt2: Any, method: str, tmp_path: Path):
    """The factored reading of our model, and the merged one of theirs; LoRA and DoRA on the tied table too."""
    ours, (params, apply) = fgpt.fuse_qkv(load_hf_model(gpt2, tmp_path)), fgpt.from_module(gpt2)
    tables = "" if method == "ia3" else "|transformer\\.w[tp]e"
    reference = with_noise(FRESH[method](params, MATRICES + tables) | fgpt.trainable_leaves(params, r".*ln_f\.bias"))

    def path(name: str) -> str:
        name = name.removeprefix("transformer.").replace("h.", "blocks.").replace("ln_f.bias", "ln_f.b")
        for old, new in NAMES.items():
            name = name.replace(old, new)
        return name

    renamed: Any = {path(name): x for name, x in reference.items()}
    assert_near(apply(fgpt.adapt(params, reference), X).logits, fgpt.apply(fgpt.adapt(ours, renamed), X))
    batch = fgpt.Batch(X[:, :-1], X[:, 1:], torch.ones(3, 8))
    expected = grad(lambda a: fgpt.loss(fgpt.adapt(ours, a), batch))(renamed)
    got = grad(lifted_loss(params, apply))(reference)
    assert_near({path(name): x for name, x in got.items()}, expected)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora_on_gpt2_are_pefts(gpt2: Any, dora: bool):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, use_dora=dora
    )
    model = peft.get_peft_model(copy.deepcopy(gpt2), config).eval()
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    with torch.no_grad():
        rng = torch.Generator().manual_seed(1)
        for x in trained.values():
            x.add_(0.1 * torch.randn(x.shape, generator=rng))
    params, apply = fgpt.from_module(gpt2)
    adapters: Any = {}
    for path in (p for p in weight_matrices(params) if ".c_" in p):
        a, b, *m = (x for name, x in trained.items() if f"{path}.lora_" in name)
        lora = fgpt.LoRA(a.detach(), b.detach(), 8.0)
        adapters[path] = fgpt.DoRA(lora, m[0].detach()) if dora else lora
    assert len(leaves(adapters)) == len(trained)
    assert_near(apply(fgpt.adapt(params, adapters), X).logits, model(input_ids=X).logits.detach())
    gpt2_loss(model).backward()
    got = leaves(grad(lifted_loss(params, apply))(adapters))
    assert_near(list(got.values()), [x.grad for x in trained.values()])


def test_a_model_that_peft_has_wrapped_is_a_module_too(gpt2: nn.Module):
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(gpt2), config).eval()  # pyright: ignore
    params, apply = fgpt.from_module(model)
    grads = grad(lifted_loss(params, apply))(fgpt.trainable_leaves(params, r".*lora_[AB].*"))
    gpt2_loss(model).backward()
    expected = [x.grad for x in model.parameters() if x.requires_grad]
    assert_near(list(leaves(grads).values()), expected)


def test_gpt2_under_the_transforms(gpt2: nn.Module):
    """Per-example gradients, an exact Hessian-vector product, an ensemble."""
    params, apply = fgpt.from_module(gpt2)
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), 2, target=MATRICES))

    def loss(a: Any, row: Tensor) -> Tensor:
        return F.cross_entropy(apply(fgpt.adapt(params, a), row[None]).logits[0, :-1], row[1:])

    each = vmap(grad(loss), in_dims=(None, 0))(adapters, X)
    assert_near(each, stack_trees([grad(loss)(adapters, row) for row in X]))
    several = [with_noise(adapters, seed=i) for i in range(3)]
    assert_near(
        vmap(loss, in_dims=(0, None))(stack_trees(several), X[0]), torch.stack([loss(a, X[0]) for a in several])
    )
    v = with_noise(tree_map(torch.zeros_like, adapters), seed=9)
    _, hv = jvp(lambda a: grad(loss)(a, X[0]), (adapters,), (v,))
    inputs = tree_map(lambda x: x.clone().requires_grad_(), adapters)
    first = torch.autograd.grad(loss(inputs, X[0]), list(leaves(inputs).values()), create_graph=True)
    dot = sum((g * d).sum() for g, d in zip(first, leaves(v).values(), strict=True))
    assert_near(list(leaves(hv).values()), torch.autograd.grad(dot, list(leaves(inputs).values())))  # pyright: ignore
