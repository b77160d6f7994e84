"""GGUF files: every tensor is the one that went in, as transformers reads it too."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.gguf_files import MODELS, gguf_tensors, in_ggml_order, random_model, write_gguf
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from transformers import (
    AutoModelForCausalLM,
)

from fgpt.io.gguf import open_gguf

KINDS = {
    Kind.F32: 0.0,
    Kind.F16: 2e-3,
    Kind.BF16: 2e-2,
    Kind.Q8_0: 2e-2,
    Kind.Q5_1: 0.2,
    Kind.Q5_0: 0.2,
    Kind.Q4_1: 0.3,
    Kind.Q4_0: 0.4,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_the_one_that_went_in(name: str, kind: Kind, tmp_path: Path):
    arch, config = MODELS[name]
    model = random_model(config)
    stored = write_gguf(tmp_path / "m.gguf", arch, model, kind)
    file = open_gguf(tmp_path / "m.gguf")
    reference = gguf_tensors(model)
    assert file.sizes == {name: tuple(x.shape) for name, x in reference.items()}
    dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    for hub, x in reference.items():
        got = file.read(hub)
        assert got.dtype == (dtype if x.ndim > 1 else torch.float32)
        assert got.is_contiguous()
        assert got.untyped_storage().nbytes() == got.nbytes  # its own memory, and no more
        torch.testing.assert_close(got.float(), x, atol=KINDS[kind] if x.ndim > 1 else 0.0, rtol=0.0)
        decoded = dequantize(stored[file.sources[hub].name], kind if x.ndim > 1 else Kind.F32)
        restored = in_ggml_order(arch, hub, got.float(), config)
        assert np.array_equal(restored.numpy(), decoded), hub  # bit by bit what the library expands


KEYS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"]


@pytest.mark.parametrize("name", MODELS)
def test_the_config_is_the_hubs(name: str, tmp_path: Path):
    """What the file says, given to transformers as a config.json, is the same config."""
    arch, config = MODELS[name]
    write_gguf(tmp_path / "m.gguf", arch, random_model(config), Kind.F16)
    got = open_gguf(tmp_path / "m.gguf").config
    restored = type(config).from_dict(dict(got))
    keys = [*KEYS, "tie_word_embeddings"]
    if arch in ("llama", "qwen2", "qwen3"):
        keys += ["num_key_value_heads", "intermediate_size", "rms_norm_eps", "hidden_act"]
        keys += {"llama": ["attention_bias", "mlp_bias", "head_dim"], "qwen3": ["attention_bias", "head_dim"]}.get(
            arch, []
        )
    if arch == "gptneox":
        keys += ["intermediate_size", "layer_norm_eps", "hidden_act", "use_parallel_residual", "attention_bias"]
    if arch == "gpt2":
        keys += ["layer_norm_epsilon", "activation_function"]
    for key in keys:
        assert getattr(restored, key) == getattr(config, key), key
    if arch not in ("gpt2", "gptneox"):
        assert restored.rope_parameters == config.rope_parameters
    if arch == "gptneox":
        assert got["rotary_pct"] == 0.5
    assert got["torch_dtype"] == "float16"


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][0] != "gptneox"])
def test_transformers_reads_the_same(name: str, tmp_path: Path):
    arch, config = MODELS[name]
    write_gguf(tmp_path / "m.gguf", arch, random_model(config), Kind.Q8_0, fields={"general.name": "m"})
    file = open_gguf(tmp_path / "m.gguf")
    # the config is given, for of what the file says transformers knows no biases, widths of heads or GPT-2's context
    reader = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    reference = gguf_tensors(reader)
    assert file.sizes.keys() == reference.keys()
    for hub in reference:
        torch.testing.assert_close(file.read(hub), reference[hub], atol=1e-6, rtol=1e-6, msg=hub)


def test_large_tensors_are_expanded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arch, config = MODELS["llama"]
    write_gguf(tmp_path / "m.gguf", arch, random_model(config), Kind.Q4_1)
    file = open_gguf(tmp_path / "m.gguf")
    whole = {name: file.read(name) for name in file.sizes}
    monkeypatch.setattr("fgpt.io.gguf_header.CHUNK", 100)
    assert all(torch.equal(file.read(name), x) for name, x in whole.items())
