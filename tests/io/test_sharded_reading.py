"""`load(.., shard=True)`: each process reads its part of the blocks' matrices and no other byte of them. Here one
process reads every part in turn; `tests/sharding` has several.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import hf_gpt2, same
from builders.hf_models import hf_model

import fgpt
from fgpt.distributed import World
from fgpt.io import models, safetensors_files
from fgpt.kernels.sharded_matrix import Sharded, join_rows
from fgpt.layers import weight_matrices
from fgpt.tree import get_at, leaves, replace_at, walk
from fgpt.weights import shape

FAMILIES = ["gpt2", "gptj", "neox", "llama", "llama, one kv head"]


def write(family: str, folder: Path) -> None:
    model: Any = hf_gpt2() if family == "gpt2" else hf_model(family)
    model.save_pretrained(folder, max_shard_size="20KB")


def load_parts(folder: Path, size: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[fgpt.GPT]:
    parts: list[fgpt.GPT] = []
    for rank in range(size):
        monkeypatch.setattr(models, "world", lambda rank=rank: World(rank, size))
        parts.append(fgpt.load(folder, **options, shard=True))
    return parts


def join(parts: list[fgpt.GPT]) -> fgpt.GPT:
    paths = [path for path, x in walk(parts[0]) if isinstance(x, Sharded)]
    return replace_at(parts[0], {path: join_rows([get_at(part, path) for part in parts]) for path in paths})


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_the_whole_model(family: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(family, tmp_path)
    for options in ({}, {"quantize": "int8"}, {"dtype": torch.bfloat16}):
        parts = load_parts(tmp_path, size, monkeypatch, **options)
        matrices = weight_matrices(parts[0].blocks)
        assert all(isinstance(w, Sharded) for w in matrices.values())
        assert same(join(parts), fgpt.load(tmp_path, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_byte_of_another_part_is_read(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All ranks together read each matrix of the blocks once, and each rank the rest of the model."""
    write(family, tmp_path)
    count, read_at = [0], safetensors_files._read_at

    def counted(path: Path, offsets: Any, x: torch.Tensor) -> None:
        count[0] += x.nbytes
        read_at(path, offsets, x)

    monkeypatch.setattr(safetensors_files, "_read_at", counted)
    whole = fgpt.load(tmp_path)
    matrices = {path: shape(w) for path, w in weight_matrices(whole.blocks).items()}
    in_parts = sum(4 * out * inp for out, inp in matrices.values())
    rest = sum(x.nbytes for x in leaves(whole).values()) - in_parts
    assert count == [in_parts + rest]
    by_rank: list[int] = []
    for rank in range(3):
        count[0] = 0
        monkeypatch.setattr(models, "world", lambda rank=rank: World(rank, 3))
        fgpt.load(tmp_path, shard=True)
        by_rank.append(count[0] - rest)
    assert sum(by_rank) == in_parts
    assert max(by_rank) == sum(4 * -(-out // 3) * inp for out, inp in matrices.values())


def test_a_quantized_model_is_split_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    params = fgpt.quantize(fgpt.load("nano"), "nf4")
    fgpt.save(params, tmp_path)
    whole = fgpt.load(tmp_path)
    monkeypatch.setattr(models.sharding.distributed, "world", lambda: World(1, 2))
    part = fgpt.load(tmp_path, shard=True)
    assert same(part.blocks[0].mlp.up.w, fgpt.shard(whole, world=World(1, 2)).blocks[0].mlp.up.w)


def test_a_process_by_itself_loads_the_whole(tmp_path: Path):
    write("llama", tmp_path)
    assert same(fgpt.load(tmp_path, shard=True), fgpt.load(tmp_path))
