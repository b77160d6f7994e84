"""Sharded files: nothing is read before all of it fits, one tensor is in memory at a time."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.hf_models import hf_model, write_shard_index
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import fgpt
from fgpt.families import mapping
from fgpt.io import models
from fgpt.tree import leaves

# ------------------------------------------------------------------------------------------------------------ bad input


def test_nothing_is_read_before_all_of_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shape that is wrong in the last shard is told before a number of the first is read."""
    hf_model("llama").save_pretrained(tmp_path, max_shard_size="4KB")
    last = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    save_file({name: x[:1].clone() for name, x in load_file(last).items()}, last, {"format": "pt"})
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: pytest.fail("allocated") if "device" not in k else EMPTY(*a, **k)
    )
    with pytest.raises(fgpt.InputError, match=r"expected shape \[\d+(, \d+)?\], got \[1(, \d+)?\]"):
        fgpt.load(str(tmp_path))


EMPTY = torch.empty


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda f: (f / "model-00001.safetensors").unlink(),
            r"index\.json names model-00001\.safetensors, which is not",
        ),
        (lambda f: write_shard_index(f, {"a": "../b"}), r"names \.\./b, which is not beside it"),
        (lambda f: write_shard_index(f, {}), "expected a weight_map of tensor names to file names"),
        (lambda f: write_shard_index(f, [1]), "expected a weight_map"),
        (lambda f: cut(f / "model-00002.safetensors", 100), r"model-00002\.safetensors: not a whole safetensors file"),
        (lambda f: cut(f / "model-00001.safetensors", 4), r"model-00001\.safetensors: not a whole safetensors file"),
        (lambda f: twice(f), r"model-00002\.safetensors: tensor \S+ is in another shard too"),
    ],
    ids=["gone", "elsewhere", "empty", "no map", "cut", "cut early", "twice"],
)
def test_spoiled_shards_are_refused(spoil: Any, says: str, tmp_path: Path):
    tensors = {name: x.clone() for name, x in hf_model("llama").state_dict().items()}
    hf_model("llama").config.save_pretrained(tmp_path)
    names = sorted(tensors)
    where = {name: f"model-0000{1 + i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, tmp_path / file, {"format": "pt"})
    write_shard_index(tmp_path, where)
    fgpt.load(str(tmp_path))
    spoil(tmp_path)
    with pytest.raises(fgpt.InputError, match=says):
        fgpt.load(str(tmp_path))


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def twice(folder: Path) -> None:
    first, second = (load_file(folder / f"model-0000{i}.safetensors") for i in (1, 2))
    name = min(first)
    save_file(second | {name: first[name]}, folder / "model-00002.safetensors", {"format": "pt"})


# --------------------------------------------------------------------------------------------------------------- memory


class Made(TorchDispatchMode):
    """The most bytes that a new tensor of a dtype took."""

    def __init__(self) -> None:
        super().__init__()
        self.most: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_meta:
            self.most[out.dtype] = max(self.most.get(out.dtype, 0), out.nbytes)
        return out


def test_a_bf16_file_is_loaded_without_an_fp32_copy(tmp_path: Path):
    hf_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    with Made() as recorder:
        params = fgpt.load(str(tmp_path), torch.bfloat16)
    assert torch.float32 not in recorder.most
    assert recorder.most[torch.bfloat16] == max(x.nbytes for x in leaves(params).values())
    with Made() as recorder:  # and quantized, with one of the largest matrix at most
        fgpt.load(str(tmp_path), torch.bfloat16, quantize="int8")
    assert recorder.most[torch.float32] <= 4 * params.blocks[0].mlp.up.w.numel()  # pyright: ignore[reportAttributeAccessIssue]


def test_one_tensor_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was read is let go of before the next is read, where it is not what is kept."""
    hf_model("gptj").half().save_pretrained(tmp_path)
    alive: list[weakref.ref[torch.Tensor]] = []
    read = models.lazy_tensors

    def watch(path: Path) -> dict[str, mapping.LazyTensor]:
        def one(lazy: mapping.LazyTensor) -> mapping.LazyTensor:
            def reader() -> Any:
                assert not [x for ref in alive if (x := ref()) is not None]
                x = lazy.read()
                alive.append(weakref.ref(x))  # pyright: ignore[reportArgumentType]
                return x

            return mapping.LazyTensor(lazy.shape, reader)

        return {name: one(x) for name, x in read(path).items()}

    monkeypatch.setattr(models, "lazy_tensors", watch)
    fgpt.load(str(tmp_path))
    assert len(alive) > 20
