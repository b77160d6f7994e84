"""torch.export takes the forward pass as one graph of fixed shapes: a program that needs no fgpt computes the same."""

import operator
from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise

import fgpt

LLAMA: dict[str, Any] = {"norm_type": "rms", "gated_mlp": True, "biases": frozenset(), "rotary_dim": 8, "n_kv": 1}
MODELS: dict[str, fgpt.GPT] = {"gpt2": tiny(), "llama": tiny(**LLAMA, activation="silu")}
MODELS["adapted"] = fgpt.adapt(MODELS["gpt2"], with_noise(fgpt.lora(MODELS["gpt2"], fgpt.key(0), rank=2)))
MODELS["int8"] = fgpt.quantize(MODELS["gpt2"], "int8")
LIBRARIES = {"int8": ["bitsandbytes"]}
"""Whose operators a program has besides torch's."""


@pytest.mark.parametrize("name", MODELS)
def test_the_exported_program_computes_the_same(name: str):
    params, rows = MODELS[name], tokens(31, 2, 9)
    program = torch.export.export(fgpt.as_module(fgpt.apply, params), (rows,))
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"} - {operator.getitem}
    assert {str(target).partition(".")[0] for target in calls} == {"aten", *LIBRARIES.get(name, ())}
    other = tokens(31, 2, 9, seed=1)
    with torch.no_grad():
        close(program.module()(other), fgpt.apply(params, other), 1e-6)
