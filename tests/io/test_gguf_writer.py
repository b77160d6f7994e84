"""GGUF files of ours hold what an independent writer's do, and are read by fgpt, transformers and llama.cpp."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from builders import close, tiny, tokens, with_noise
from builders.gguf_files import MODELS, random_model, write_gguf
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, LlamaConfig

import fgpt
from fgpt.io.gguf_header import read_header
from fgpt.tree import leaves

TYPES: dict[Any, Kind] = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
TOKENS = tokens(48, 2, 20)


def hub_model(name: str, folder: Path) -> tuple[Any, fgpt.GPT]:
    """transformers' model with random weights, and the same as a tree."""
    model = random_model(MODELS[name][1])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.2)
    model.save_pretrained(folder)
    return model, fgpt.load(folder)


def stored(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_are_those_of_another_writer(name: str, tmp_path: Path):
    model, params = hub_model(name, tmp_path / "hub")
    fgpt.save_gguf(params, tmp_path / "ours.gguf", type="f32")
    expected = write_gguf(tmp_path / "theirs.gguf", MODELS[name][0], model)
    found = stored(tmp_path / "ours.gguf")
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert np.array_equal(found[key].data, x), key
    fields, others = (read_header(tmp_path / x).fields for x in ("ours.gguf", "theirs.gguf"))
    for key, value in others.items():
        if not key.startswith("tokenizer"):
            assert fields[key] == value, key


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", MODELS)
def test_read_back(name: str, type: Any, tmp_path: Path):
    """The logits are those of the model whose matrices the gguf package rounds."""
    _, params = hub_model(name, tmp_path / "hub")
    fgpt.save_gguf(params, tmp_path / "a.gguf", type=type)
    read = fgpt.load(tmp_path / "a.gguf", None if type == "f32" else torch.float32)
    assert read.cfg == params.cfg
    for path, x in leaves(params).items():
        kind = TYPES[type] if x.ndim > 1 and path != "wpe.w" else Kind.F32
        if type == "q4_0" and path == ("wte.w" if params.cfg.tie_word_embeddings else "head.w"):
            kind = Kind.Q8_0
        rounded = dequantize(quantize(x.contiguous().numpy(), kind), kind)
        assert np.array_equal(leaves(read)[path].numpy(), rounded), path
    error = (fgpt.apply(read, TOKENS) - fgpt.apply(params, TOKENS)).abs().max()
    assert error <= {"f32": 0.0, "f16": 0.02, "q8_0": 0.3, "q4_0": 10.0}[type]


@pytest.mark.parametrize("name", ["llama", "llama, no groups, untied", "qwen2"])
def test_transformers_reads_the_same(name: str, tmp_path: Path):
    """It reads neither GPT-2's context nor the size of Qwen 3's heads."""
    model, params = hub_model(name, tmp_path / "hub")
    fgpt.save_gguf(params, tmp_path / "a.gguf", type="f32", metadata=TOKENIZER)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    with torch.no_grad():
        close(read(TOKENS).logits, model(TOKENS).logits, 1e-4)


TOKENIZER = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(48)]}
"""transformers counts the tokens where it has no vocab_size."""


def test_bf16(tmp_path: Path):
    params = tiny(d_model=64, n_head=2)
    fgpt.save_gguf(params, tmp_path / "a.gguf", type="bf16")
    read = leaves(fgpt.load(tmp_path / "a.gguf", torch.float32))
    for path, x in leaves(params).items():
        is_matrix = x.ndim > 1 and path != "wpe.w"
        assert torch.equal(read[path], x.bfloat16().float() if is_matrix else x), path


SCALINGS = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_angles(kind: str, tmp_path: Path):
    config = LlamaConfig(
        vocab_size=48,
        max_position_embeddings=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        rope_parameters={"rope_type": kind, "rope_theta": 500000.0, **SCALINGS[kind]},
    )
    random_model(config).save_pretrained(tmp_path / "hub")
    params = fgpt.load(tmp_path / "hub")
    fgpt.save_gguf(params, tmp_path / "a.gguf", type="f32")
    read = fgpt.load(tmp_path / "a.gguf")
    assert read.cfg == params.cfg
    assert read.cfg.rope_scaling is not None
    assert torch.equal(fgpt.apply(read, TOKENS), fgpt.apply(params, TOKENS))


def test_what_the_architecture_has_and_the_model_has_not(tmp_path: Path):
    """Biases of zeros, a head that is the table again."""
    bare = tiny(biases=frozenset())
    fgpt.save_gguf(bare, tmp_path / "gpt2.gguf", type="f32")
    read = fgpt.load(tmp_path / "gpt2.gguf")
    assert read.cfg == dataclasses.replace(bare.cfg, biases=fgpt.Config.biases)
    close(fgpt.apply(read, tokens(31, 2, 9)), fgpt.apply(bare, tokens(31, 2, 9)), 1e-6)
    tied = tiny(rotary_dim=4, activation="gelu", parallel_residual=True)
    fgpt.save_gguf(tied, tmp_path / "neox.gguf", type="f32")
    assert stored(tmp_path / "neox.gguf").keys() >= {"output.weight", "token_embd.weight"}
    close(fgpt.apply(fgpt.load(tmp_path / "neox.gguf"), tokens(31, 2, 9)), fgpt.apply(tied, tokens(31, 2, 9)), 1e-6)


LLAMA: dict[str, Any] = {"norm_type": "rms", "gated_mlp": True, "biases": frozenset(), "rotary_dim": 8} | {
    "activation": "silu",
    "tie_word_embeddings": False,
}


def test_a_window_that_never_takes_effect(tmp_path: Path):
    params = tiny(**LLAMA, sliding_window=24)
    fgpt.save_gguf(params, tmp_path / "a.gguf", type="f32")
    read = fgpt.load(tmp_path / "a.gguf")
    close(fgpt.apply(read, tokens(31, 2, 24)), fgpt.apply(params, tokens(31, 2, 24)), 1e-6)


REFUSED = {
    "GPT-J": (
        lambda: tiny(
            interleaved=True,
            parallel_residual=True,
            n_norms=1,
            rotary_dim=4,
            tie_word_embeddings=False,
            biases=frozenset({"up", "down", "norm", "head"}),
        ),
        "llama.cpp has nothing that computes this gptj",
    ),
    "a window": (lambda: tiny(**LLAMA, sliding_window=8), "nothing that computes this mistral"),
    "an activation": (lambda: tiny(activation="relu"), "has no place for activation 'relu' (only 'gelu_tanh')"),
    "scaled scores": (
        lambda: tiny(scale_attn_by_inverse_layer_idx=True),
        "no place for scale_attn_by_inverse_layer_idx",
    ),
    "quantized": (lambda: fgpt.quantize(tiny(), "int8"), "merge(params, base='dequantized')"),
    "adapted": (lambda: fgpt.adapt(tiny(), fgpt.lora(tiny(), fgpt.key(0), rank=2)), "still carries an adapter"),
    "a classifier": (lambda: fgpt.with_classification_head(tiny(), 3, fgpt.key(0)), "classifier of 3 classes"),
    "large elements": (lambda: with_noise(tiny(), std=1e5), "not finite in fp16: write it as bf16 or f32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gguf_file_cannot_hold(name: str, tmp_path: Path):
    make, message = REFUSED[name]
    with pytest.raises(fgpt.InputError) as error:
        fgpt.save_gguf(make(), tmp_path / "a.gguf")
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ llama.cpp


def llama_cpp_logits(path: Path, row: torch.Tensor, **options: Any) -> torch.Tensor:
    """The logits of a text by llama.cpp, in fp32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, **options)
    model.eval(row.tolist())
    scores = torch.from_numpy(np.array(model.scores[: len(row)]))
    model.close()
    return scores


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path):
    """Up to its approximations: keys and values in fp16, and for GPT-NeoX GELU by tanh."""
    _, params = hub_model(name, tmp_path / "hub")
    fgpt.save_gguf(params, tmp_path / "a.gguf", type="f32")
    expected = fgpt.apply(params, TOKENS[0])
    found = llama_cpp_logits(tmp_path / "a.gguf", TOKENS[0])
    assert expected.std() > 0.2
    close(found, expected, 5e-3 * float(expected.std()))
