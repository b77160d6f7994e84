"""`shard` as a transform of a params tree: what it splits, counts, leaves alone and refuses."""

from pathlib import Path

import pytest
import torch
from builders import same
from builders.params_files import wide_gpt

import fgpt
from fgpt.distributed import World
from fgpt.kernels.sharded_matrix import Sharded
from fgpt.layers import has_quantized, num_parameters
from fgpt.sharding import has_sharded
from fgpt.tree import nbytes, num_elements, tree_map, walk

TWO = World(rank=1, size=2)


def test_a_process_by_itself_has_everything():
    params = wide_gpt()
    assert fgpt.shard(params) is params
    assert not has_sharded(params)
    with pytest.raises(fgpt.InputError, match="matches no path"):
        fgpt.shard(params, target="nothing")


@pytest.mark.parametrize("form", ["fp32", "nf4", "int8", "rotated"])
def test_a_part_counts_as_what_it_is(form: str):
    params = wide_gpt()
    if form != "fp32":
        params = fgpt.quantize(params, "nf4" if form == "nf4" else "int8", rotate=form == "rotated")
    part = fgpt.shard(params, world=TWO)
    assert has_sharded(part)
    assert has_quantized(part) == (form != "fp32")
    assert num_parameters(part) == num_parameters(params)
    blocks, halves = params.blocks[0].mlp, part.blocks[0].mlp
    assert 0.5 * nbytes(blocks) < nbytes(halves) < 0.6 * nbytes(blocks)
    assert 0.5 * num_elements(blocks) < num_elements(halves) < 0.6 * num_elements(blocks)
    assert same(part.wte, params.wte)
    assert fgpt.lora(part, fgpt.key(0), rank=2).keys() == fgpt.lora(params, fgpt.key(0), rank=2).keys()


def test_only_targets_are_split():
    part = fgpt.shard(wide_gpt(), world=TWO, target=r"wte|blocks\.0\.attn\.q")
    assert [path for path, x in walk(part) if isinstance(x, Sharded)] == ["wte.w", "blocks.0.attn.q.w"]


@pytest.mark.parametrize("rotate", [False, True])
def test_what_is_sharded_or_adapted_is_refused(rotate: bool):
    params = fgpt.quantize(wide_gpt(), "int8", rotate=rotate)
    part = fgpt.shard(params, world=TWO)
    with pytest.raises(fgpt.InputError, match=r"blocks\.0\.attn\.q is sharded already: shard a plain or quantized"):
        fgpt.shard(part, world=TWO)
    with pytest.raises(fgpt.InputError, match=r"blocks\.0\.attn\.q is adapted already: shard a plain or quantized"):
        fgpt.shard(fgpt.adapt(params, fgpt.lora(params, fgpt.key(0), rank=2)), world=TWO)


def test_a_tuned_part_counts_as_the_whole():
    params = wide_gpt()
    part = fgpt.shard(params, world=TWO)
    whole, trained = fgpt.trainable_leaves(params), fgpt.trainable_leaves(part)
    assert trained.keys() == whole.keys()
    assert fgpt.num_trainable(trained) == fgpt.num_trainable(whole) == num_parameters(fgpt.adapt(part, trained))
    assert num_elements(trained["blocks.0.mlp.up.w"]) == whole["blocks.0.mlp.up.w"].numel() / 2
    with pytest.raises(fgpt.InputError, match="has shape"):
        fgpt.adapt(part, {"blocks.0.attn.q.w": trained["blocks.0.mlp.up.w"]})


def test_what_replaces_a_part_has_its_dtype_in_the_model_alone():
    part = fgpt.shard(tree_map(torch.Tensor.bfloat16, wide_gpt()), world=TWO)
    trained = fgpt.trainable_leaves(part)
    model = fgpt.adapt(part, trained)
    assert trained["blocks.0.mlp.up.w"].dtype == torch.float32
    assert model.blocks[0].mlp.up.w.dtype == torch.bfloat16
    assert model.blocks[0].mlp.up.w.part.dtype == torch.float32


def test_the_leaves_of_a_tuned_model_in_parts_are_parts():
    part = fgpt.shard(wide_gpt(), world=TWO)
    trained = fgpt.trainable_leaves(part)
    again = fgpt.trainable_leaves(fgpt.adapt(part, trained))
    assert again.keys() == trained.keys()
    assert isinstance(again["blocks.0.mlp.up.w"], fgpt.ShardedParameter)
    assert same(again, trained)


def test_what_parts_of_parameters_are_refused(tmp_path: Path):
    part = fgpt.shard(wide_gpt(), world=TWO)
    trained = fgpt.trainable_leaves(part)
    with pytest.raises(fgpt.InputError, match="is in parts already: leave out zero_redundancy"):
        fgpt.zero_redundancy(fgpt.adamw(1e-3), world=TWO).init(trained)
    with pytest.raises(fgpt.InputError, match=r"blocks\.0\.attn\.q is sharded already"):
        fgpt.shard(fgpt.adapt(part, trained), world=TWO)
    with pytest.raises(fgpt.InputError, match=r"is ShardedParameter, which files do not hold; unshard\(tree\) first"):
        fgpt.save_adapters(trained, tmp_path / "adapters.safetensors")


def test_a_part_has_no_task_vector():
    part = fgpt.shard(wide_gpt(), world=TWO)
    with pytest.raises(fgpt.InputError, match=r"blocks\.0\.attn\.q\.w is trained in parts: unshard"):
        fgpt.combine(part, [fgpt.trainable_leaves(part, ".*attn.q.w")] * 2)


def test_a_part_is_not_quantized_or_fused():
    part = fgpt.shard(wide_gpt(), world=TWO)
    with pytest.raises(fgpt.InputError, match=r"blocks\.0\.attn\.q is Sharded already: quantize a plain params tree"):
        fgpt.quantize(part, "int8")
    with pytest.raises(fgpt.InputError, match="q, k and v are quantized, sharded or adapted already"):
        fgpt.fuse_qkv(part)
    with pytest.raises(fgpt.InputError, match="part 1 of 2 of a sharded matrix in process 0 of 1"):
        fgpt.apply(part, torch.zeros(1, 3, dtype=torch.long))


def test_a_dora_over_parts_is_saved_by_one_process(tmp_path: Path):
    """Files hold the adapter alone: no norms of the base are computed for them."""
    params = wide_gpt()
    adapters = fgpt.dora(params, fgpt.key(0), rank=2)
    for name, base in (("whole", params), ("part", fgpt.shard(params, world=TWO))):
        fgpt.save_peft(adapters, base, tmp_path / name, "gpt2")
    assert same(fgpt.load_peft(tmp_path / "part", params), fgpt.load_peft(tmp_path / "whole", params))
