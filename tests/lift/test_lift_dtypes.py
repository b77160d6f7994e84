"""Lifted modules in half precision and quantized."""

import copy
from typing import Any

import pytest
import torch
from builders import hf_gpt2, with_noise
from builders.lifted_modules import FRESH, MATRICES, X, assert_near, lifted_loss
from torch.func import grad, vmap

import fgpt
from fgpt.layers import weight_matrices
from fgpt.tree import leaves


@pytest.mark.parametrize("method", FRESH)
def test_a_half_precision_module_keeps_its_dtype_and_the_adapters_theirs(method: str):
    module = hf_gpt2().to(torch.bfloat16)
    params, apply = fgpt.from_module(module)
    adapters = FRESH[method](params, MATRICES)
    logits = apply(fgpt.adapt(params, adapters), X).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, module(X).logits)
    assert torch.equal(apply(fgpt.adapt(params, fgpt.trainable_leaves(params)), X).logits, module(X).logits)
    grads = leaves(grad(lifted_loss(params, apply))(with_noise(adapters) | fgpt.trainable_leaves(params, r".*ln_.*")))
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads.values())


@pytest.mark.parametrize("to", ["nf4", "fp4", "int8", "blockwise8"])
def test_a_quantized_base_is_the_module_of_its_dequantized_numbers(to: Any):
    module = hf_gpt2(n_embd=64)
    params, apply = fgpt.from_module(module)
    small = fgpt.quantize(params, to, target=MATRICES)
    plain = fgpt.merge(small, base="dequantized")
    other = copy.deepcopy(module)
    for path, w in weight_matrices(plain).items():
        other.get_parameter(f"{path}.weight").data = w.T.clone() if ".c_" in path else w.clone()  # pyright: ignore
    assert_near(apply(small, X).logits, other(X).logits.detach(), 1e-6)
    assert not torch.allclose(apply(small, X).logits, module(X).logits, atol=1e-3)
    adapters = with_noise(
        fgpt.dora(small, fgpt.key(0), 4, target=MATRICES) | fgpt.trainable_leaves(small, r".*ln_.*"), 0.05
    )
    assert_near(grad(lifted_loss(small, apply))(adapters), grad(lifted_loss(plain, apply))(adapters))
    each = vmap(lambda row: grad(lambda a: apply(fgpt.adapt(small, a), row[None]).logits.square().mean())(adapters))(X)
    assert all(len(g) == len(X) and g.isfinite().all() for g in leaves(each).values())
