"""GGUF files that are cut, flipped or of no model get one clear line."""

import math
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.gguf_files import MODELS, WIDE, random_model, write_gguf
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
)

from fgpt.errors import InputError
from fgpt.io.gguf import open_gguf
from fgpt.io.gguf_header import read_header

ONE = np.ones((64, 64), np.float32)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "architecture": (
        "llama",
        {"fields": {"general.architecture": "mamba"}},
        "architecture is 'mamba'; expected one of",
    ),
    "missing key": (
        "llama",
        {"fields": {"llama.block_count": None}},
        r"llama\.block_count: expected a positive integer",
    ),
    "key's type": ("llama", {"fields": {"llama.context_length": "9"}}, r"context_length: .*positive integer, got '9'"),
    "not a number": ("llama", {"fields": {"llama.rope.freq_base": math.nan}}, r"freq_base: .*positive number, got nan"),
    "layers": ("llama", {"fields": {"llama.block_count": 2**31 - 1}}, r"block_count: expected at most the 20 tensors"),
    "fewer layers": ("llama", {"fields": {"llama.block_count": 1}}, r"tensor blk\.1\.attn_k\.weight has no place"),
    "heads": ("llama", {"fields": {"llama.attention.head_count": 3}}, r"head_count_kv: expected a divisor of the 3"),
    "a head each": ("llama", {"fields": {"llama.attention.head_count": [4, 4]}}, r"head_count: .*got \[4, 4\]"),
    "width": (
        "llama",
        {"fields": {"llama.embedding_length": 128}},
        r"token_embd\.weight \(model\.embed_tokens\.weight\) has",
    ),
    "vocabulary": ("llama", {"fields": {"llama.vocab_size": 49}}, r"vocab_size: expected 48, the rows of token_embd"),
    "rope of a part": ("llama", {"fields": {"llama.rope.dimension_count": 8}}, r"rope\.dimension_count: expected 16"),
    "experts": ("llama", {"fields": {"llama.expert_count": 8}}, r"expert_count is 8, which is not read here"),
    "a window": ("qwen2", {"fields": {"qwen2.attention.sliding_window": 8}}, r"sliding_window: expected no window"),
    "missing": (
        "llama",
        {"without": ["blk.1.ffn_up.weight"]},
        r"blk\.1\.ffn_up\.weight \(model\.layers\.1\.mlp\.up_proj",
    ),
    "no table": ("llama", {"without": ["token_embd.weight"]}, r"token_embd\.weight is missing"),
    "surplus": ("llama", {"tensors": {"blk.0.attn_q_norm.weight": ONE}}, r"attn_q_norm\.weight has no place in"),
    "rope in Qwen": ("qwen3", {"tensors": {"rope_freqs.weight": ONE[0]}}, "rope_freqs.weight has no place in qwen3"),
    "a type": ("llama", {"tensors": {"output_norm.weight": np.ones(64, np.int32)}}, "stored as I32; expected F32, F16"),
    "a part": ("llama", {"fields": {"split.count": 3}}, "is one of 3 parts; merge them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_model_gets_one_line(name: str, tmp_path: Path):
    arch, edit, expected = REFUSED[name]
    model = random_model(MODELS[arch][1])
    if "general.architecture" in edit.get("fields", {}):
        write_gguf(tmp_path / "m.gguf", arch, model)
        data = (tmp_path / "m.gguf").read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1)
        (tmp_path / "m.gguf").write_bytes(data)
    else:
        write_gguf(tmp_path / "m.gguf", arch, model, **edit)
    with pytest.raises(InputError, match=expected) as caught:
        open_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "m.gguf") in str(caught.value)


def test_names_that_are_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="No such file or directory; expected a GGUF file"):
        open_gguf(tmp_path / "m.gguf")
    with pytest.raises(InputError, match="expected a GGUF file"):
        open_gguf(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" * 99)
    with pytest.raises(InputError, match="not a GGUF file: it does not begin with GGUF"):
        open_gguf(tmp_path / "m.gguf")
    for version, expected in ((1, "got version 1"), (3 << 24, "got a big-endian file")):
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
        with pytest.raises(InputError, match=expected):
            open_gguf(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", "llama", random_model(MODELS["llama"][1]))
    with pytest.raises(InputError, match="no tensor named wte; expected a hub name such as model"):
        open_gguf(tmp_path / "m.gguf").read("wte")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    config = LlamaConfig(
        **WIDE | {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 9},
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
    )
    write_gguf(path, "llama", random_model(config), Kind.Q8_0)
    return path.read_bytes()


def read_all(path: Path) -> int:
    file = open_gguf(path)
    return sum(file.read(name).numel() for name in file.sizes)


def test_a_truncated_file_is_refused(whole: bytes, tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    assert read_all(path) == 9 * 32 * 2 + 32 * 32 * 5 + 16 * 32 * 2 + 32 * 3
    entries = read_header(path).entries.values()
    start = min(entry.offset for entry in entries)
    end = max(entry.offset + entry.size for entry in entries)  # what follows is padding
    for keep in [*range(0, start, 8), *range(start, end, 256), end - 1]:
        path.write_bytes(whole[:keep])
        with pytest.raises(InputError):
            open_gguf(path)
    path.write_bytes(whole)
    file = open_gguf(path)
    last = max(file.sources, key=lambda name: file.entries[file.sources[name].name].offset)
    path.write_bytes(whole[: end - 1])
    with pytest.raises(InputError, match="has become shorter since it was opened"):
        file.read(last)


@pytest.mark.slow
@settings(max_examples=300)
@given(data=st.data())
def test_a_header_with_flipped_bytes_is_refused_or_read(
    data: st.DataObject, whole: bytes, tmp_path_factory: pytest.TempPathFactory
):
    """Never another error, never a giant: a count that is corrupt cannot ask for more than the file holds."""
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(whole)
    start = min(entry.offset for entry in read_header(path).entries.values())
    corrupt = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, start - 1))
        corrupt[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 127, 128, 255])))
    path.write_bytes(corrupt)
    with suppress(InputError):
        assert read_all(path) > 0


@pytest.mark.parametrize("at", [8, 16, 24])  # the counts of tensors and of keys, the length of the first key
@pytest.mark.parametrize("count", [2**63, 2**40, 2**24, 70000])
def test_giant_counts_are_refused_at_once(at: int, count: int, whole: bytes, tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
    with pytest.raises(InputError, match="not a whole GGUF file"):
        open_gguf(tmp_path / "m.gguf")


def test_tensors_may_not_overlap(whole: bytes, tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(whole)
    found = read_header(tmp_path / "m.gguf").entries
    first = min(entry.offset for entry in found.values())
    at = [entry.offset - first for entry in found.values()][3]
    place = whole.rindex(struct.pack("<Q", at), 0, first)
    (tmp_path / "m.gguf").write_bytes(whole[:place] + bytes(8) + whole[place + 8 :])
    with pytest.raises(InputError, match="inside another or off its alignment"):
        open_gguf(tmp_path / "m.gguf")
