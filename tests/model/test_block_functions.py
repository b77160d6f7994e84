"""A model block by block is the model, in every family and of packed rows."""

from typing import Any

import pytest
import torch
from builders import tiny, tokens
from builders.hf_models import hf_model, save_and_load

import fgpt
from fgpt.model import block_functions

SEGMENTS = torch.tensor([[1] * 4 + [2] * 5 + [0] * 3, [1] * 9 + [0] * 3])
CU_SEQLENS = torch.tensor([[0, 4, 9, 12], [0, 9, 12, 12]])


def check(params: fgpt.GPT, **documents: Any) -> None:
    text = tokens(31, 2, 12)
    x, functions = block_functions(params, text, **documents)
    expected, activations = fgpt.trace(params, text, target=r"embed|blocks\.\d+(\.mlp\.neurons)?", **documents)
    assert torch.equal(x, activations["embed"])
    for i, (f, p) in enumerate(zip(functions, params.blocks, strict=True)):
        neurons: list[torch.Tensor] = []
        tap = fgpt.Tap(lambda _, x, neurons=neurons: neurons.append(x) or x, rf"blocks\.{i}\.mlp\.neurons")
        x = f(x, p, tap)
        assert torch.equal(x, activations[f"blocks.{i}"])
        assert torch.equal(neurons[0], activations[f"blocks.{i}.mlp.neurons"])
    assert torch.equal(fgpt.final_norm(params, x), expected)


@pytest.mark.parametrize("name", ["gptj", "neox", "llama, yarn", "qwen3, a window in one layer"])
def test_the_blocks_one_after_the_other_are_the_model(name: str):
    params = save_and_load(hf_model(name))
    check(params)
    check(params, segments=SEGMENTS)
    check(params, cu_seqlens=CU_SEQLENS)


def test_each_block_has_the_scale_of_its_layer():
    check(tiny(scale_attn_by_inverse_layer_idx=True))


def test_a_block_runs_with_other_weights():
    params, others, text = tiny(), tiny(n_layer=1), tokens(31, 2, 12)
    x, (_, second) = block_functions(params, text)
    assert not torch.equal(second(x, others.blocks[0]), second(x, params.blocks[1]))
