"""Spoiled files of bitsandbytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from builders import tiny
from builders.hostile_files import LLAMA, assert_enough, assert_same_reading, outcome_of
from builders.mutations import DEEP, each_in_turn, join_safetensors, mutations, split_safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

import fgpt
from fgpt import families
from fgpt.errors import InputError
from fgpt.families import mapping
from fgpt.kernels.quantized_linear import Blockwise4bit
from fgpt.tree import walk

# --------------------------------------------------------------------------------------------------------- bitsandbytes


def as_bitsandbytes(params: fgpt.GPT) -> dict[str, Tensor]:
    """A model's tensors, those of its first block in 4 bits, as bitsandbytes packs them."""
    family, tensors = families.family_of(params.cfg), {}
    paths = {s.name: s.paths[0] for s in family.tensor_mappings(params.cfg)}
    weights = dict(walk(fgpt.quantize(params)))
    for name, x in mapping.to_hf(params, family).items():
        w: Any = weights[paths[name.removeprefix(family.prefix)]]
        if not isinstance(w, Blockwise4bit):
            tensors[name] = x
            continue
        scales: Any = w.absmax
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(w.shape)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": scales_offset(w)}
        tensors |= {name: w.codes.reshape(-1, 1), f"{name}.absmax": scales.codes, f"{name}.quant_map": w.code.clone()}
        tensors |= {f"{name}.nested_absmax": scales.absmax, f"{name}.nested_quant_map": scales.code.clone()}
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = pack_codes(json.dumps(state))
    return tensors


def scales_offset(w: Blockwise4bit) -> float:
    assert w.offset is not None
    return w.offset.item()


def pack_codes(text: str) -> Tensor:
    return torch.tensor([*text.encode("utf-8", "surrogatepass")], dtype=torch.uint8)


def check_bitsandbytes(params: fgpt.GPT, path: Path) -> None:
    """Asserts that the matrices are those that bitsandbytes makes of the file."""
    tensors, family = load_file(path), families.family_of(params.cfg)
    weights = dict(walk(params))
    for s in family.tensor_mappings(params.cfg):
        name = family.prefix + s.name
        parts = {k.removeprefix(f"{name}."): x for k, x in tensors.items() if k.startswith(f"{name}.")}
        if parts:
            state = QuantState.from_dict(parts, device=torch.device("cpu"))
            assert_same_reading(
                {name: fgpt.dense(weights[s.paths[0]])}, {name: dequantize_4bit(tensors[name], state).float()}
            )
        elif name in tensors:
            assert_same_reading({name: weights[s.paths[0]]}, {name: tensors[name].float()})


@pytest.mark.slow
def test_spoiled_files_of_bitsandbytes(tmp_path: Path):
    params = tiny(**LLAMA | {"n_layer": 1, "d_model": 64, "d_mlp": 64, "rotary_dim": 32})
    fgpt.save(params, tmp_path)
    path, state = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors = as_bitsandbytes(params)

    def check() -> None:
        if found := outcome_of("bitsandbytes", path, lambda: fgpt.load(str(tmp_path))):
            check_bitsandbytes(found, path)

    def with_state(text: str) -> None:
        save_file(tensors | {state: pack_codes(text)}, path)
        check()

    save_file(tensors, path)
    check_bitsandbytes(fgpt.load(str(tmp_path)), path)
    data, state_text = path.read_bytes(), bytes(tensors[state].tolist()).decode()
    header, body = split_safetensors(data)
    for text in DEEP:
        with_state(text)
    each_in_turn(50, mutations(json.loads(state_text)), with_state)
    for odd in (torch.tensor(10**12), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(0), torch.ones(3)):
        for part in (
            state,
            state.replace("quant_state.bitsandbytes__nf4", "absmax"),
            state.rpartition(".quant_state")[0],
        ):
            save_file(tensors | {part: odd.contiguous()}, path)
            check()

    def with_structure(text: str) -> None:
        path.write_bytes(join_safetensors(text, body))
        check()

    each_in_turn(20, mutations(header), with_structure)
    assert_enough("bitsandbytes")


# ------------------------------------------------------------------------------------------------ what has been mended


def test_codes_that_are_taken_for_scales(tmp_path: Path):
    """A state that tells of no nested scales, over those that are: codes are no scales."""
    params = tiny(**LLAMA | {"n_layer": 1, "d_model": 64, "d_mlp": 64, "rotary_dim": 32})
    fgpt.save(params, tmp_path)
    tensors = as_bitsandbytes(params)
    name = next(name for name in tensors if "quant_state" in name)
    state = json.loads(bytes(tensors[name].tolist()))
    plain = {key: x for key, x in state.items() if "nested" not in key}
    save_file(tensors | {name: pack_codes(json.dumps(plain))}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"absmax: expected float32, as its state has no nested scales, got uint8"):
        fgpt.load(str(tmp_path))
