"""Rotary embeddings in GGUF files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.gguf_files import HEADS, MODELS, WIDE, random_model, write_gguf
from torch import Tensor
from transformers import (
    LlamaConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fgpt.errors import InputError
from fgpt.io.gguf import open_gguf

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(config: Any) -> Tensor:
    """What the converter writes: plain frequencies over Llama 3's, by transformers."""
    pairs = config.head_dim // 2
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(pairs).float() / pairs)
    return plain / ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))[0]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_rope_is_recognized(factor: float, tmp_path: Path):
    rope = LLAMA3 | {"factor": factor, "rope_theta": 500000.0}
    config = LlamaConfig(**WIDE, **HEADS, head_dim=64, rope_parameters=rope)
    factors = llama3_factors(config)
    assert factors.max() == pytest.approx(factor)
    assert len({round(x, 3) for x in factors.tolist()}) > 3  # some between
    write_gguf(tmp_path / "m.gguf", "llama", random_model(config), tensors={"rope_freqs.weight": factors.numpy()})
    file = open_gguf(tmp_path / "m.gguf")
    assert file.config["rope_scaling"] == LLAMA3 | {"factor": factor}
    assert "rope_freqs.weight" not in {source.name for source in file.sources.values()}
    corrupt = factors.clone()
    corrupt[20] *= 1.01
    write_gguf(tmp_path / "m.gguf", "llama", random_model(config), tensors={"rope_freqs.weight": corrupt.numpy()})
    with pytest.raises(InputError, match=r"rope_freqs\.weight: expected Llama 3's factors.*use the model's hub folder"):
        open_gguf(tmp_path / "m.gguf")
    write_gguf(
        tmp_path / "m.gguf", "llama", random_model(config), tensors={"rope_freqs.weight": np.ones(32, np.float32)}
    )
    assert open_gguf(tmp_path / "m.gguf").config["rope_scaling"] is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 10},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10},
        ),
        ({"type": "none"}, None),
        ({"factor": 4.0}, r"rope\.scaling\.type: expected linear or yarn beside a factor, got nothing"),
        ({"type": "longrope", "factor": 4.0}, r"rope\.scaling\.type: expected none, linear or yarn, got 'longrope'"),
        ({"type": "linear"}, r"rope\.scaling\.factor: expected a positive number, got nothing"),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 10, "attn_factor": 0.5},
            r"rope\.scaling\.attn_factor is 0\.5, which is not read here",
        ),
    ],
)
def test_rope_scaling(fields: dict[str, Any], expected: Any, tmp_path: Path):
    arch, config = MODELS["qwen2"]
    keys = {f"qwen2.rope.scaling.{key}": value for key, value in fields.items()}
    write_gguf(tmp_path / "m.gguf", arch, random_model(config), fields=keys)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            open_gguf(tmp_path / "m.gguf")
    else:
        assert open_gguf(tmp_path / "m.gguf").config["rope_scaling"] == expected
