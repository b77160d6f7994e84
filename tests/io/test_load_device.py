"""`load(.., device=)`: each tensor is moved as soon as it is read, and quantized where it then is. The meta device
stands for a GPU: it has shapes and bytes, and an operation that mixes it with a CPU tensor raises.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import same
from builders.quantized import FORMATS
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fgpt
from fgpt.cli.training.build import load_base
from fgpt.io import models
from fgpt.kernels.quantized_linear import Rotated
from fgpt.model import abstract_params
from fgpt.recipes import InstructionRecipe, find
from fgpt.tree import leaves, nbytes, num_elements

CONFIG = fgpt.Config(n_layer=6, n_head=4, d_model=128, n_ctx=32, vocab_size=100, d_mlp=512)
LARGEST = 4 * 128 * 512
"""Bytes of the largest matrix in fp32."""


class Memory(TorchDispatchMode):
    """The most bytes alive on each kind of device, and the operations that read a large tensor of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.peak: dict[str, int] = {}
        self.on_cpu: set[str] = set()
        self._storages: dict[int, tuple[str, int, StorageWeakRef]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in inputs:
            if x.device.type == "cpu" and x.numel() > 1000:
                self.on_cpu.add(func.overloadpacket.__name__)
        out = func(*args, **(kwargs or {}))
        was_read = any(x.device.type == "cpu" or x.untyped_storage()._cdata in self._storages for x in inputs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (was_read or x.device.type == "cpu"):  # shapes of an empty model are no bytes
                storage = x.untyped_storage()
                self._storages[storage._cdata] = x.device.type, storage.nbytes(), StorageWeakRef(storage)
        self._storages = {key: x for key, x in self._storages.items() if not x[2].expired()}
        for kind in ("cpu", "meta"):
            alive = sum(size for device, size, _ in self._storages.values() if device == kind)
            self.peak[kind] = max(self.peak.get(kind, 0), alive)
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("model")
    models.save(fgpt.init(CONFIG, fgpt.key(0)), at)
    return at


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("format", [*FORMATS, None])
def test_nothing_is_computed_on_the_host(folder: Path, format: Any, dtype: torch.dtype | None):
    with Memory() as memory:
        params = fgpt.load(folder, dtype, format, device="meta")
    assert memory.on_cpu <= {"view", "_to_copy", "detach"}
    expected, actual = leaves(fgpt.load(folder, dtype, format)), leaves(params)
    assert {path: (x.shape, x.dtype) for path, x in actual.items()} == {
        path: (x.shape, x.dtype) for path, x in expected.items()
    }
    assert {x.device.type for x in actual.values()} == {"meta"}


@pytest.mark.parametrize("format", [*FORMATS, None])
def test_neither_side_holds_the_whole_model(folder: Path, format: Any):
    fgpt.load(folder, torch.bfloat16, format, device="meta")  # codes of the formats are made once
    with Memory() as memory:
        params = fgpt.load(folder, torch.bfloat16, format, device="meta")
    assert memory.peak["cpu"] <= 1.1 * LARGEST
    assert memory.peak["meta"] <= nbytes(params) + 3.5 * LARGEST  # as it was read, cast, and widened for the codes
    assert nbytes(params) + 3.5 * LARGEST < 0.75 * 4 * num_elements(abstract_params(CONFIG))  # the file has more


def base_recipe(folder: Path, **options: Any) -> InstructionRecipe:
    recipe: Any = find("lora-nano")
    adapter = replace(recipe.adapter, target=r"blocks\..*\.attn\.qkv")
    return replace(recipe, base=str(folder), adapter=adapter, **options)


def test_a_fused_base_is_quantized_while_it_is_read(folder: Path):
    """All but q, k and v, which are fused first."""
    with Memory() as memory:
        params = load_base(base_recipe(folder, quantize="nf4", dtype="bfloat16", device="meta"))
    assert {x.device.type for x in leaves(params).values()} == {"meta"}
    fused = 2 * 6 * 3 * 128 * 128
    assert memory.peak["meta"] <= nbytes(params) + 2.5 * fused + 2 * LARGEST
    expected = fgpt.quantize(fgpt.fuse_qkv(fgpt.load(folder, torch.bfloat16)), "nf4")
    assert same(load_base(base_recipe(folder, quantize="nf4", dtype="bfloat16", device="cpu")), expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rotated_base_is_quantized_while_it_is_read(folder: Path, dtype: Any, fused: bool):
    recipe = base_recipe(folder, quantize="rotated-int8", dtype=dtype, device="cpu")
    recipe = recipe if fused else replace(recipe, adapter=find("lora-nano").adapter)
    plain = fgpt.load(folder, getattr(torch, dtype))
    expected = fgpt.quantize(fgpt.fuse_qkv(plain) if fused else plain, "int8", rotate=True)
    assert isinstance(expected.blocks[0].mlp.up.w, Rotated)
    assert same(load_base(recipe), expected)
    assert load_base(recipe).blocks[0].mlp.up.w.dtype == getattr(torch, dtype)


def test_a_saved_tree_an_untied_head_and_a_classifier_are_moved(folder: Path, tmp_path: Path):
    config = replace(CONFIG, vocab_size=4096)
    fgpt.save(fgpt.load(folder, quantize="nf4"), tmp_path / "tree")
    fgpt.save(fgpt.init(replace(config, tie_word_embeddings=False), fgpt.key(0)), tmp_path / "untied")
    classifier = fgpt.with_classification_head(fgpt.init(config, fgpt.key(0)), 3, fgpt.key(0))
    fgpt.save(classifier, tmp_path / "classifier", like="nano", labels=["a", "b", "c"])
    for name in ("tree", "untied", "classifier"):
        moved = leaves(fgpt.load(tmp_path / name, device="meta"))
        assert moved.keys() == leaves(fgpt.load(tmp_path / name)).keys()
        assert {x.device.type for x in moved.values()} == {"meta"}
