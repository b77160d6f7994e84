"""A spoiled file of params gets one typed line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.params_files import assert_trees_identical, wide_gpt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fgpt
from fgpt.io import models

Q, K = "blocks.0.attn.q", "blocks.0.attn.k"
Edit = Callable[[dict[str, Tensor], Any], Any]


def with_edit(name: str, x: Any) -> Edit:
    def edit(tensors: dict[str, Tensor], structure: Any) -> None:
        tensors[name] = x if isinstance(x, Tensor) else x(tensors[name])

    return edit


def with_field(*path: Any) -> Edit:
    """The structure with the value at path[:-1] replaced by path[-1]."""

    def edit(tensors: dict[str, Tensor], structure: Any) -> None:
        for step in path[:-2]:
            structure = structure[step]
        structure[path[-2]] = path[-1]

    return edit


def _rotate(tensors: dict[str, Tensor], structure: Any, block: int) -> None:
    """Q's weight behind a rotation."""
    for path in [path for path in tensors if path.startswith(f"{Q}.w.")]:
        tensors[path.replace(f"{Q}.w.", f"{Q}.w.base.")] = tensors.pop(path)
    layer = _at(structure, *W[:-1])
    layer["w"] = {"Rotated": {"base": layer["w"], "block": block}}


W = ("GPT", "blocks", "tuple", 0, "Block", "attn", "Attention", "q", "Linear", "w")
SPOILED: dict[str, tuple[Edit, str]] = {
    "missing": (lambda t, s: t.pop(f"{Q}.w.codes"), rf"tensor {Q}\.w\.codes is missing"),
    "surplus": (with_edit("extra", torch.zeros(1)), "tensor extra has no place in the structure"),
    "dtype": (
        with_edit(f"{Q}.w.codes", lambda x: x.float()),
        rf"{Q}\.w\.codes: expected UInt8.*got torch.float32 \[64, 32\]",
    ),
    "axes": (
        with_edit(f"{Q}.w.codes", lambda x: x.view(-1)),
        rf"{Q}\.w\.codes: expected UInt8.*got torch.uint8 \[2048\]",
    ),
    "code": (with_edit(f"{Q}.w.code", lambda x: x[:8]), rf"{Q}\.w\.code: expected"),
    "blocks": (with_edit(f"{Q}.w.absmax.codes", lambda x: x[:9]), r"need \d+ scales"),
    "scales": (
        with_edit(f"{Q}.w.absmax.absmax", lambda x: x.half()),
        "scales and code of a quantized weight are float32",
    ),
    "rows": (with_edit(f"{Q}.b", lambda x: x[:9]), rf"{Q}\.b: expected shape \[64\], got \[9\]"),
    "narrow": (
        with_edit(f"{Q}.w.codes", lambda x: x.view(32, 64)),
        rf"{Q}\.w: expected shape \[64, 64\], got \[32, 128\]",
    ),
    "whole numbers": (with_edit("wte.w", lambda x: x.int()), r"wte\.w: expected a floating dtype, got torch\.int32"),
    "node": (
        with_field(*W, {"Popen": {}}),
        rf'{Q}\.w is {{"Popen": {{}}}}; expected a tensor, dict, tuple or known node',
    ),
    "place": (with_field(*W[:-2], {"tuple": []}), rf"{Q}: expected Linear, got \(\)"),
    "field": (with_field(*W, "Blockwise4bit", "color", "tensor"), r"Blockwise4bit has no field 'color'"),
    "kind": (with_field(*W, "Blockwise4bit", "kind", "nf5"), rf"{Q}\.w\.kind: expected .*got 'nf5'"),
    "static dtype": (with_field(*W, "Blockwise4bit", "dtype", "nn"), rf"{Q}\.w\.dtype: expected dtype, got <module"),
    "rotation by an odd block": (
        lambda t, s: _rotate(t, s, 48),
        rf"{Q}\.w: block is 48; expected one of 8, 16, 32, 64 that divides a row of 64 elements",
    ),
    "offset": (
        lambda t, s: (t.pop(f"{Q}.w.offset"), _at(s, *W, "Blockwise4bit").pop("offset")),
        "an offset to quantized scales only",
    ),
    "nothing": (with_field(*W[:-1], {}), rf"{Q}\.w: expected .*got None"),
    "config": (with_field("GPT", "cfg", "n_head", 4), r"is a model of n_head=4, but config\.json says n_head=2"),
    "config's type": (with_field("GPT", "cfg", "n_head", "2"), r"cfg: expected Config, got"),
    "layers": (lambda t, s: _drop_block(t, s), r"blocks\.1 is missing: not a whole model of its config"),
    "depth": (with_field(*W, "deep"), "expected a tensor, dict, tuple or known node"),
}


def _at(structure: Any, *path: Any) -> Any:
    for step in path:
        structure = structure[step]
    return structure


def _drop_block(tensors: dict[str, Tensor], structure: Any) -> None:
    structure["GPT"]["blocks"]["tuple"].pop()
    for name in [name for name in tensors if name.startswith("blocks.1.")]:
        del tensors[name]


@pytest.fixture(scope="module")
def saved_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    fgpt.save(fgpt.quantize(wide_gpt()), path)
    return path


def copy_of(saved_tree: Path, to: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    (to / "config.json").write_bytes((saved_tree / "config.json").read_bytes())
    with safe_open(saved_tree / "fgpt.safetensors", framework="pt") as file:
        return load_file(saved_tree / "fgpt.safetensors"), file.metadata()


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_file_gets_one_typed_line(name: str, saved_tree: Path, tmp_path: Path):
    tensors, metadata = copy_of(saved_tree, tmp_path)
    structure = json.loads(metadata["structure"])
    edit, expected = SPOILED[name]
    edit(tensors, structure)
    whole = {name: x.contiguous().clone() for name, x in tensors.items()}
    save_file(whole, tmp_path / "fgpt.safetensors", metadata | {"structure": json.dumps(structure)})
    with pytest.raises(fgpt.InputError, match=expected) as caught:
        fgpt.load(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "fgpt.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"format": "pt"}, "format is 'pt'; expected a file that fgpt has saved"),
        ({"format": "fgpt", "structure": "{"}, "structure is not valid JSON"),
        ({"format": "fgpt", "structure": '{"tuple": [' * 5000}, "structure is not valid JSON"),
        ({"format": "fgpt", "structure": '{"tuple": [' * 900 + "]}" * 900}, "structure is not valid JSON|has no place"),
    ],
)
def test_other_structures_are_refused(metadata: dict[str, str], expected: str, saved_tree: Path, tmp_path: Path):
    tensors, _ = copy_of(saved_tree, tmp_path)
    save_file(tensors, tmp_path / "fgpt.safetensors", metadata)
    with pytest.raises(fgpt.InputError, match=expected):
        fgpt.load(str(tmp_path))


def test_a_file_of_an_older_config_is_read(saved_tree: Path, tmp_path: Path):
    """Fields that Config has since then have their defaults; those that it always had must be there."""
    tensors, metadata = copy_of(saved_tree, tmp_path)
    structure = json.loads(metadata["structure"])
    cfg = structure["GPT"]["cfg"]
    for name in ("sliding_window", "full_layers", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
        del cfg[name]
    save_file(tensors, tmp_path / models.TREE, metadata | {"structure": json.dumps(structure)})
    assert_trees_identical(fgpt.load(str(tmp_path)), fgpt.load(str(saved_tree)))
    del cfg["tie_word_embeddings"]
    save_file(tensors, tmp_path / models.TREE, metadata | {"structure": json.dumps(structure)})
    with pytest.raises(fgpt.InputError, match="cfg: expected Config, got"):
        fgpt.load(str(tmp_path))


@pytest.mark.parametrize("stretch", [[4.0, 32.0, 1.0], [4.0, "32", 1.0, 6.0, 1.2, True], [2.0, "8"], "yarn"])
def test_a_rope_of_other_numbers_is_refused(stretch: Any, saved_tree: Path, tmp_path: Path):
    tensors, metadata = copy_of(saved_tree, tmp_path)
    structure = json.loads(metadata["structure"])
    structure["GPT"]["cfg"]["rope_scaling"] = stretch
    save_file(tensors, tmp_path / models.TREE, metadata | {"structure": json.dumps(structure)})
    with pytest.raises(fgpt.InputError, match="cfg: expected Config, got"):
        fgpt.load(str(tmp_path))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(keep: float, saved_tree: Path, tmp_path: Path):
    copy_of(saved_tree, tmp_path)
    data = (saved_tree / "fgpt.safetensors").read_bytes()
    (tmp_path / "fgpt.safetensors").write_bytes(data[: int(keep * len(data))])
    with pytest.raises(fgpt.InputError, match="not a whole safetensors file"):
        fgpt.load(str(tmp_path))
