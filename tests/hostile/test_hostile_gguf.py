"""Spoiled GGUF files."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from builders.gguf_files import HEADS, in_ggml_order, random_model, write_gguf
from builders.hostile_files import assert_enough, assert_same_reading, outcome_of, time_limit
from builders.mutations import bit_flips, truncations
from transformers import GPT2Config, LlamaConfig

import fgpt
from fgpt import families
from fgpt.families import mapping

NARROW: dict[str, Any] = {"vocab_size": 9, "max_position_embeddings": 8, "hidden_size": 32, "num_hidden_layers": 1}
FEW: dict[str, Any] = HEADS | {"intermediate_size": 32}
GGUFS = {
    "llama": (LlamaConfig(**NARROW, **FEW), gguf.GGMLQuantizationType.Q8_0),
    "gpt2": (GPT2Config(vocab_size=9, n_positions=8, n_embd=32, n_layer=1, n_head=2), gguf.GGMLQuantizationType.F32),
}


def check_gguf(arch: str, params: fgpt.GPT, path: Path, config: Any) -> None:
    """Asserts that a model has the sizes and the numbers that gguf's own reader finds in its file."""
    with time_limit():
        reader = gguf.GGUFReader(path)
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 1)
    family = families.family_of(params.cfg)
    ours = {}
    for hub_name, x in mapping.to_hf(params, family).items():
        name = table.get_name(hub_name, try_suffixes=(".weight", ".bias"))
        ours[name] = in_ggml_order(arch, hub_name, x, config)
    reference = {}
    for t in reader.tensors:
        shape = [int(n) for n in reversed(t.shape)]
        reference[t.name] = torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type), np.float32)).view(shape)
    assert_same_reading(ours, reference)
    for key, value in (("block_count", params.cfg.n_layer), ("attention.head_count", params.cfg.n_head)):
        assert reader.fields[f"{arch}.{key}"].contents() == value


@pytest.mark.slow
@pytest.mark.parametrize("arch", GGUFS)
def test_spoiled_gguf_files(arch: str, tmp_path: Path):
    path = tmp_path / "m.gguf"
    config, kind = GGUFS[arch]
    write_gguf(path, arch, random_model(config), kind)
    data = path.read_bytes()
    start = len(data) - min(t.data_offset for t in gguf.GGUFReader(path).tensors)
    start = len(data) - start

    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        if params := outcome_of("gguf", path, lambda: fgpt.load(str(path))):
            check_gguf(arch, params, path, config)

    check(data)
    assert fgpt.load(str(path)) is not None
    for corrupt in (*truncations(data, 40), *bit_flips(data, 40, start), *bit_flips(data, 10, seed=1)):
        check(corrupt)
    path.write_bytes(data)
    keys = [field.offset for field in gguf.GGUFReader(path).fields.values() if field.offset]
    for word in (8, 16, 24):  # the counts of tensors and keys, the length of the first key
        for count in (0, 1, 2, 70_000, 2**24, 2**31, 2**40, 2**63 - 1, 2**64 - 1):
            check(data[:word] + struct.pack("<Q", count) + data[word + 8 :])
    for offset in keys[:12]:  # the type of a key's value, after its length and its name
        kind_at = offset + 8 + int.from_bytes(data[offset : offset + 8], "little")
        for number in (3, 7, 8, 9, 13, 2**32 - 1):
            check(data[:kind_at] + struct.pack("<I", number) + data[kind_at + 4 :])
    assert_enough("gguf", len(GGUFS))
