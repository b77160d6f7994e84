"""Spoiled trees of our own format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import tiny, with_noise
from builders.hostile_files import AGAIN, assert_enough, assert_same_reading, outcome_of
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
from safetensors import safe_open
from safetensors.torch import load_file

import fgpt
from fgpt.io import serialization
from fgpt.tree import leaves


def same_form(form: Any, original: Any) -> bool:
    """Whether a structure is one that we would write, but for fields of None, which may be left out."""
    if isinstance(form, dict) and isinstance(original, dict):
        return original.keys() <= form.keys() and all(same_form(x, original.get(k)) for k, x in form.items())
    if isinstance(form, list) and isinstance(original, list | tuple):
        return len(form) == len(original) and all(same_form(x, y) for x, y in zip(form, original))
    if isinstance(form, str) and isinstance(original, list):  # the layers with a bias, as older files have them
        return sorted(form.split()) == original
    return form == original or (form != form and original != original)


def check_tree(tree: Any, path: Path) -> None:
    """Asserts that a tree has the tensors and the structure that its file has."""
    tensors = load_file(path)
    assert_same_reading(leaves(tree), tensors) if isinstance(tree, dict | tuple) or leaves(tree) else None
    with safe_open(path, framework="pt") as file:
        form = json.loads(file.metadata()["structure"])
    assert same_form(form, serialization._structure(tree, "", "", {}))


TREES: dict[str, Callable[[], Any]] = {
    "adapters": lambda: union(tiny(n_layer=1, d_model=64, d_mlp=64)),
    "nf4": lambda: fgpt.quantize(tiny(n_layer=1, d_model=64, d_mlp=64)),
    "int8": lambda: fgpt.quantize(tiny(n_layer=1, d_model=64, d_mlp=64), "int8"),
}


def union(params: fgpt.GPT) -> fgpt.Adapters:
    return with_noise(
        fgpt.lora(params, fgpt.key(0), 2, target=r".*\.q", rs=True, dropout=0.1)
        | fgpt.dora(params, fgpt.key(0), 2, target=r".*\.v")
        | fgpt.ia3(params, r".*\.k", r".*\.down")
        | fgpt.trainable_leaves(params, r".*\.q\.b|ln_f\.w")
    )


@pytest.mark.parametrize("kind", TREES)
def test_spoiled_trees(kind: str, tmp_path: Path):
    tree = TREES[kind]()
    base = tiny(n_layer=1, d_model=64, d_mlp=64)
    if kind == "adapters":
        path = tmp_path / "adapters.safetensors"
        serialization.write_tree(path, tree)
    else:
        path = tmp_path / "fgpt.safetensors"
        fgpt.save(tree, tmp_path)
    data = path.read_bytes()
    header, body = split_safetensors(data)
    structure = json.loads(header["__metadata__"]["structure"])

    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        if found := outcome_of("trees", path, lambda: serialization.read_tree(path)):
            check_tree(found, path)
        if kind == "adapters":
            outcome_of(AGAIN, path, lambda: serialization.load_adapters(path, base))
        elif found := outcome_of(AGAIN, path, lambda: fgpt.load(str(tmp_path), dtype=None)):
            check_tree(found, path)

    def with_structure(text: str) -> bytes:
        return join_safetensors(json.dumps(header | {"__metadata__": {"format": "fgpt", "structure": text}}), body)

    check(data)
    assert serialization.read_tree(path) is not None
    for corrupt in (
        *length_mutations(data)[::3],
        *structural_mutations(data)[::2],
        *truncations(data, 5),
        *bit_flips(data, 15, len(data) - len(body)),
    ):
        check(corrupt)
    for text in DEEP:
        check(with_structure(text))
    each_in_turn(60, mutations(structure), lambda text: check(with_structure(text)))
    each_in_turn(20, mutations(header), lambda text: check(join_safetensors(text, body)))
    assert_enough("trees", len(TREES))
