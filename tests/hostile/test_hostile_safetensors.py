"""Spoiled safetensors: whole models and shards."""

import json
from pathlib import Path

import pytest
import torch
from builders import same, tiny
from builders.hostile_files import assert_enough, assert_same_reading, outcome_of
from builders.mutations import (
    DEEP,
    bit_flips,
    each_in_turn,
    join_safetensors,
    length_mutations,
    mutations,
    split_safetensors,
    structural_mutations,
    truncations,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import fgpt
from fgpt import families
from fgpt.errors import InputError
from fgpt.families import mapping

# ------------------------------------------------------------------------------------------- models in the hub's layout


def serialize(params: fgpt.GPT) -> dict[str, Tensor]:
    """A model's tensors as the hub names them, without a prefix."""
    family = families.family_of(params.cfg)
    return {name.removeprefix(family.prefix): x for name, x in mapping.to_hf(params, family).items()}


def error_line(files: list[Path], params: fgpt.GPT) -> dict[str, Tensor]:
    """What safetensors itself reads in `files`."""
    family, found = families.family_of(params.cfg), {}
    for file in files:
        found |= {name.removeprefix(family.prefix): x.float() for name, x in load_file(file).items()}
    return {name: x for name, x in found.items() if not name.endswith(family.buffers)}


def test_spoiled_models(saved_gpt: Path):
    path = saved_gpt / "model.safetensors"
    data = path.read_bytes()
    header, body = split_safetensors(data)

    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        if params := outcome_of("safetensors", path, lambda: fgpt.load(str(saved_gpt))):
            assert params.cfg == tiny(n_layer=1).cfg
            assert_same_reading(serialize(params), error_line([path], params))

    corrupt = [
        *length_mutations(data),
        *structural_mutations(data),
        *truncations(data, 30),
        *bit_flips(data, 40, len(data) - len(body)),
    ]
    for each_of in [*corrupt, *bit_flips(data, 10, seed=1), *(join_safetensors(text, body) for text in DEEP)]:
        check(each_of)
    each_in_turn(60, mutations(header), lambda text: check(join_safetensors(text, body)))
    assert_enough("safetensors")


def test_whole_numbers_are_no_weights(saved_gpt: Path):
    """The header's word for one tensor, F32 made I32, is enough: as floats they would be numbers of another size."""
    path = saved_gpt / "model.safetensors"
    header, body = split_safetensors(path.read_bytes())
    header["transformer.ln_f.weight"]["dtype"] = "I32"
    path.write_bytes(join_safetensors(json.dumps(header), body))
    for dtype in (torch.float32, None):
        with pytest.raises(InputError, match=r"tensor ln_f\.weight: expected a floating dtype, got int32"):
            fgpt.load(str(saved_gpt), dtype)


# --------------------------------------------------------------------------------------------------------------- shards


def test_spoiled_shards(tmp_path: Path):
    params = tiny(n_layer=1)
    fgpt.save(params, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensors[name] for name in tensors if where[name] == shard}, tmp_path / shard)
    path = tmp_path / "model.safetensors.index.json"
    index = {"metadata": {"total_size": 4 * sum(x.numel() for x in tensors.values())}, "weight_map": where}

    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        if found := outcome_of("shards", tmp_path, lambda: fgpt.load(str(tmp_path))):
            listed = sorted(set(json.loads(text)["weight_map"].values()))
            assert_same_reading(serialize(found), error_line([tmp_path / name for name in listed], found))

    check(json.dumps(index))
    assert same(fgpt.load(str(tmp_path)), params)
    for text in DEEP:
        check(text)
    each_in_turn(50, mutations(index), check)
    path.write_text(json.dumps(index))
    data = (tmp_path / shards[0]).read_bytes()
    for corrupt in (*truncations(data, 5), *bit_flips(data, 5, 200)):
        (tmp_path / shards[0]).write_bytes(corrupt)
        if found := outcome_of("shards", tmp_path, lambda: fgpt.load(str(tmp_path))):
            assert_same_reading(serialize(found), error_line([tmp_path / name for name in shards], found))
    assert_enough("shards")
