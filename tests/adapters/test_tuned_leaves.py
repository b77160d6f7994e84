"""Leaves that are tuned as they are, beside adapters and below them; dtypes."""

import pytest
import torch
from builders import same, tokens, with_noise
from builders.adapters import BASES, LINEARS, loss_of
from torch.func import grad

import fgpt
from fgpt.tree import astype, leaves, num_elements, replace_at

X, Y = tokens(31, 2, 9), tokens(31, 2, 9, seed=1)


# ------------------------------------------------------------------------------------------------------ half precision


def test_a_half_precision_base_keeps_its_dtype_and_the_adapters_theirs(gpt: fgpt.GPT):
    params, adapters = astype(gpt, torch.bfloat16), with_noise(fgpt.lora(gpt, fgpt.key(0), 2, target=LINEARS))
    assert fgpt.apply(fgpt.adapt(params, adapters), X).dtype == torch.bfloat16
    assert {x.dtype for x in leaves(grad(loss_of(params))(adapters)).values()} == {torch.float32}
    assert same(leaves(fgpt.merge(fgpt.adapt(params, {}))), leaves(params))


@pytest.mark.parametrize("target", [r".*\.b", r".*ln_.*", "wte.*|wpe.*", r"blocks.*\.w", ".*"])
def test_what_is_tuned_over_a_half_precision_base_computes_in_its_dtype(target: str):
    """And is trained in fp32: what is laid there is rounded, the gradient is not."""
    params = BASES["bf16"]
    tuned = fgpt.trainable_leaves(params, target)
    assert torch.equal(fgpt.apply(fgpt.adapt(params, tuned), X), fgpt.apply(params, X))
    grads = leaves(grad(loss_of(params))(tuned))
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert all(g.abs().max() > 0 for p, g in grads.items() if not p.endswith("k.b"))  # softmax sees no key bias


# --------------------------------------------------------------------------------------------- unions and selectors


def test_lora_and_tuned_leaves_are_one_tree(gpt: fgpt.GPT):
    lora, norms = fgpt.lora(gpt, fgpt.key(0), 2), fgpt.trainable_leaves(gpt, r".*ln_.*")
    both = with_noise(lora | norms, seed=3)
    assert fgpt.num_trainable(both) == fgpt.num_trainable(lora) + 2 * 16 * (2 * 2 + 1)
    expected = fgpt.adapt(replace_at(gpt, {p: both[p] for p in norms}), {p: both[p] for p in lora})
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, both), X), fgpt.apply(expected, X))
    assert {p for p, g in leaves(grad(loss_of(gpt))(both)).items() if g.abs().max() == 0} == set()


def test_a_lora_lies_on_a_weight_tuned_in_the_same_tree(gpt: fgpt.GPT):
    """Whichever side of the union comes first, neither is silently dropped."""
    lora, full = with_noise(fgpt.lora(gpt, fgpt.key(0), 2)), with_noise(fgpt.trainable_leaves(gpt), seed=5)
    expected = fgpt.apply(fgpt.adapt(gpt, full, lora), X)
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, lora | full), X), expected)
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, full | lora), X), expected)


def test_an_ia3_scales_a_bias_tuned_in_the_same_tree(gpt: fgpt.GPT):
    scales, biases = (
        with_noise(fgpt.ia3(gpt, LINEARS, LINEARS)),
        with_noise(fgpt.trainable_leaves(gpt, r".*\.b"), seed=5),
    )
    expected = fgpt.adapt(gpt, biases, scales)
    assert same(fgpt.adapt(gpt, scales | biases), expected)
    layer, row = expected.blocks[0].mlp.up, scales["blocks.0.mlp.up"].row
    assert torch.equal(layer.b, row * biases["blocks.0.mlp.up.b"])  # pyright: ignore


def test_tuning_everything_is_the_model(gpt: fgpt.GPT):
    full = fgpt.trainable_leaves(gpt, ".*")
    assert fgpt.num_trainable(full) == num_elements(gpt)
    assert same(fgpt.adapt(gpt, full), gpt)
    moved = with_noise(full, seed=7)
    assert same(leaves(fgpt.adapt(gpt, moved)), moved)
    assert {x.dtype for x in leaves(fgpt.trainable_leaves(astype(gpt, torch.bfloat16))).values()} == {torch.float32}
