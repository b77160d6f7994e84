"""Files of bitsandbytes: four bits, eight bits, and spoiled ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from builders import close, hf_gpt2, tokens, with_noise
from builders.params_files import assert_trees_identical
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, GPT2LMHeadModel

import fgpt
from fgpt.kernels.quantized_linear import Blockwise4bit, RowwiseInt8
from fgpt.model import FusedAttention
from fgpt.tree import walk

X = tokens(31, 2, 9)


PLAIN = "transformer.h.0.attn.c_attn.weight"
STATE = f"{PLAIN}.quant_state.bitsandbytes__nf4"


def write_bitsandbytes(path: Path, width: int, **options: Any) -> GPT2LMHeadModel:
    """A GPT-2 that transformers has loaded through bitsandbytes and saved, with no dropout."""
    off: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    hf_gpt2(n_embd=width, n_layer=1, **off).save_pretrained(path / "plain")
    config = BitsAndBytesConfig(**options)
    model = GPT2LMHeadModel.from_pretrained(path / "plain", quantization_config=config, device_map="cpu")
    model.save_pretrained(path / "quantized")
    return model


def numbers(layer: Any) -> Tensor:
    """The matrix that a layer of bitsandbytes means, by its own functions."""
    w = layer.weight
    return dequantize_4bit(w.data, w.quant_state) if hasattr(w, "quant_state") else int8_vectorwise_dequant(w, w.SCB)


def matrices(p: fgpt.GPT) -> dict[str, Tensor]:
    attn, mlp = p.blocks[0].attn, p.blocks[0].mlp
    parts = [attn.qkv] if hasattr(attn, "qkv") else [attn.q, attn.k, attn.v]  # pyright: ignore
    whole = torch.cat([fgpt.dense(x.w) for x in parts])
    rest = {"attn.c_proj": attn.o, "mlp.c_fc": mlp.up, "mlp.c_proj": mlp.down}
    return {"attn.c_attn": whole} | {name: fgpt.dense(x.w) for name, x in rest.items()}


@pytest.mark.parametrize(
    ("width", "kind", "double", "storage", "fused"),
    [
        (64, "nf4", True, "uint8", True),  # 64 blocks in each of q, k and v, but their scales go by 256
        (128, "nf4", True, "uint8", False),
        (64, "fp4", False, "uint8", False),
        (128, "nf4", True, "bfloat16", False),
    ],
)
def test_four_bits_of_bitsandbytes(width: int, kind: str, double: bool, storage: str, fused: bool, tmp_path: Path):
    options = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double, "bnb_4bit_quant_storage": storage}
    model = write_bitsandbytes(tmp_path, width, load_in_4bit=True, **options)
    assert load_file(tmp_path / "quantized" / "model.safetensors")[PLAIN].dtype == getattr(torch, storage)
    params = fgpt.load(str(tmp_path / "quantized"))
    assert isinstance(params.blocks[0].attn, FusedAttention) == fused
    expected = {name: numbers(model.transformer.h[0].get_submodule(name)) for name in matrices(params)}
    for name, w in matrices(params).items():
        assert torch.equal(w, expected[name]), name
    quantized = [x for _, x in walk(params) if isinstance(x, Blockwise4bit)]
    assert len(quantized) == (4 if fused else 6)
    assert all(isinstance(x.absmax, Tensor) != double and x.kind == kind for x in quantized)
    model.train()  # in eval mode bitsandbytes multiplies in bfloat16 on some CPUs
    with torch.no_grad():
        close(fgpt.apply(params, X), model(X).logits, 1e-5)
    adapters = fgpt.lora(params, fgpt.key(0), target=r".*\.(q|v|qkv)")
    assert fgpt.apply(fgpt.adapt(params, adapters), X).isfinite().all()
    fgpt.save(params, tmp_path / "again")
    assert_trees_identical(fgpt.load(str(tmp_path / "again")), params)


def test_eight_bits_of_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, registered = write_bitsandbytes(tmp_path, 64, load_in_8bit=True), []
    monkeypatch.setattr("fgpt.io.bitsandbytes.register", lambda: registered.append(True))
    params = fgpt.load(str(tmp_path / "quantized"))
    assert registered
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    attn: Any = params.blocks[0].attn
    assert all(isinstance(x.w, RowwiseInt8) for x in (attn.q, attn.k, attn.v, attn.o))
    codes, scales = (torch.cat([getattr(x.w, name) for x in (attn.q, attn.k, attn.v)]) for name in ("codes", "absmax"))
    assert torch.equal(codes, stored[PLAIN])
    assert torch.equal(scales, stored[PLAIN.replace("weight", "SCB")])
    for name, w in matrices(params).items():  # c·s/127 in another order of rounding
        torch.testing.assert_close(w, numbers(model.transformer.h[0].get_submodule(name)), rtol=3e-7, atol=0)


def test_a_head_apart_beside_four_bits(tmp_path: Path):
    """bitsandbytes leaves a tied head plain; one that was trained and merged afterwards is kept."""
    model = write_bitsandbytes(tmp_path, 64, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    path = tmp_path / "quantized" / "model.safetensors"
    head = model.lm_head.weight.detach().float() + with_noise({"head": torch.zeros(31, 64)})["head"]
    save_file(load_file(path) | {"lm_head.weight": head}, path, {"format": "pt"})
    params = fgpt.load(str(tmp_path / "quantized"))
    assert params.head is not None
    assert torch.equal(params.head.w, head)  # pyright: ignore[reportArgumentType]
    fgpt.save(params, tmp_path / "again")
    assert_trees_identical(fgpt.load(str(tmp_path / "again")), params)


def state_with(**changes: Any) -> Callable[[Tensor], Tensor]:
    """A packed state with other fields."""
    return lambda x: torch.tensor(list(json.dumps(json.loads(bytes(x.tolist())) | changes).encode()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def nested_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nested")
    write_bitsandbytes(path, 64, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return path / "quantized"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (PLAIN, None, "c_attn.weight is missing, but .* of it are there"),
        (f"{PLAIN}.absmax", None, "c_attn.weight.absmax is missing"),
        (f"{PLAIN}.nested_quant_map", None, "nested_quant_map is missing"),
        (f"{PLAIN}.absmax", lambda x: x[:-1], "need 192 scales, got 191"),
        (f"{PLAIN}.absmax", lambda x: x.float(), "absmax: expected uint8 and a map of 256 values, got float32"),
        (f"{PLAIN}.nested_absmax", lambda x: torch.cat([x, x]), "need 1 scales, got 2"),
        (f"{PLAIN}.quant_map", lambda x: x.flip(0), "not the values of nf4"),
        (PLAIN, lambda x: x[:-64], r"do not make a 4-bit matrix of \[192, 64\]"),
        (STATE, None, "expected one quant_state.bitsandbytes__nf4 or fp4 beside it, got none"),
        (STATE, lambda x: x[:9], "not the state of a 4-bit matrix"),
        (STATE, state_with(blocksize=128), "expected blocks of 64, bitsandbytes' default, got 128"),
        (STATE, state_with(nested_blocksize=300), "block is 300; expected one of 64"),
        (STATE, state_with(quant_type="nf5"), "quant_type is 'nf5'; expected 'nf4' or 'fp4'"),
        (STATE, state_with(shape=[64, 192]), r"c_attn.weight: expected shape \[192, 64\], got \[64, 192\]"),
        (STATE, state_with(dtype="int8"), "not the state of a 4-bit matrix"),
    ],
)
def test_a_spoiled_file_of_bitsandbytes(name: str, change: Any, expected: str, nested_file: Path, tmp_path: Path):
    tensors = load_file(nested_file / "model.safetensors")
    part = tensors.pop(name)
    tensors |= {} if change is None else {name: change(part).contiguous()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((nested_file / "config.json").read_bytes())
    with pytest.raises(fgpt.InputError, match=expected) as caught:
        fgpt.load(str(tmp_path))
    assert "\n" not in str(caught.value)
