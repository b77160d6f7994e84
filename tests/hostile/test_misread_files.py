"""Files that were once misread: names twice, ranks of zero, numbers that are none."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny
from builders.hostile_files import COUNTS, time_limit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fgpt
from fgpt.data import instruction_datasets
from fgpt.errors import InputError
from fgpt.io import serialization
from fgpt.io.peft.adapter_files import load_peft


def test_json_within_json_without_end(tmp_path: Path):
    deep = "[" * 100_000
    for name, read in (
        ("config.json", lambda: fgpt.load(str(tmp_path))),
        ("adapter_config.json", lambda: load_peft(tmp_path, tiny())),
        ("data.json", lambda: instruction_datasets.load_rows(tmp_path / "data.json")),
        ("data.jsonl", lambda: instruction_datasets.load_rows(tmp_path / "data.jsonl")),
    ):
        (tmp_path / name).write_text(deep)
        with pytest.raises(InputError, match=name), time_limit():
            read()
    for name in ("data.json", "data.jsonl"):
        (tmp_path / name).write_text(f"[{'9' * 5000}]")
        with pytest.raises(InputError, match="cannot be read: Exceeds the limit"):
            instruction_datasets.load_rows(tmp_path / name)


def test_what_a_stack_held_is_not_lost(tmp_path: Path):
    """Metadata that name no part of a norm would drop it; those of ranks without end would be an overflow."""
    params = tiny(n_layer=1)
    path = tmp_path / "adapter_model.safetensors"
    fgpt.save_peft(fgpt.trainable_leaves(params, "ln_f.w"), params, tmp_path, "base")
    for content, expected in (({}, "expected an object of objects"), ({"x": []}, "names 'x' of transformer.ln_f")):
        save_file(load_file(path), path, {"fgpt_held": json.dumps({"transformer.ln_f": content})})
        with pytest.raises(InputError, match=expected):
            load_peft(tmp_path, params)
    fgpt.save_peft(fgpt.lora(params, fgpt.key(0), 2, target=r".*\.q"), params, tmp_path, "base")
    for rank in (math.inf, -1, 10**400):
        save_file(load_file(path), path, {"fgpt_held": json.dumps({"transformer.h.0.attn.c_attn": {"q": [rank, 4]}})})
        with pytest.raises(InputError, match="stacked q"):
            load_peft(tmp_path, params)
    for parts in ({"q": [1, 4, False]}, {"": [1, 4, False]}):  # A has two rows that are not zero
        save_file(load_file(path), path, {"fgpt_held": json.dumps({"transformer.h.0.attn.c_attn": parts})})
        with pytest.raises(InputError, match="stacked parts have ranks 1 in all, but A has 2 rows that are not zero"):
            load_peft(tmp_path, params)


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ("alpha", 10**400, "alpha: expected float"),
        ("alpha", math.nan, "a finite alpha"),
        ("dropout", 1.0, "a dropout from 0 to less than 1"),
        ("dropout", -1, "a dropout from 0 to less than 1"),
    ],
)
def test_trees_whose_numbers_are_none(place: str, value: Any, expected: str, tmp_path: Path):
    params, path = tiny(n_layer=1), tmp_path / "a.safetensors"
    fgpt.save_adapters(fgpt.lora(params, fgpt.key(0), 2, target="blocks.0.attn.q"), path)
    with safe_open(path, framework="pt") as file:
        structure = json.loads(file.metadata()["structure"])
    structure["dict"]["blocks.0.attn.q"]["LoRA"][place] = value
    save_file(load_file(path), path, {"format": "fgpt", "structure": json.dumps(structure)})
    with pytest.raises(InputError, match=expected):
        fgpt.load_adapters(path, params)


def test_a_lora_of_rank_0(tmp_path: Path):
    params, path = tiny(n_layer=1), tmp_path / "a.safetensors"
    serialization.write_tree(path, {"blocks.0.attn.q": fgpt.LoRA(torch.zeros(0, 16), torch.zeros(16, 0), 1.0)})
    with pytest.raises(InputError, match="expected a rank above 0"):
        fgpt.load_adapters(path, params)


def test_a_tensor_by_two_names(saved_gpt: Path):
    """With a prefix and without: the one that came last was taken."""
    path = saved_gpt / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"wte.weight": 2 * tensors["transformer.wte.weight"]}, path)
    with pytest.raises(InputError, match=r"transformer\.wte\.weight is there without transformer\. too"):
        fgpt.load(str(saved_gpt))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x" * 501])
def test_names_that_no_line_can_show(name: str, saved_gpt: Path):
    path = saved_gpt / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(1)}, path)
    with pytest.raises(InputError, match="expected up to 500 printable characters") as caught:
        fgpt.load(str(saved_gpt))
    assert str(caught.value).isprintable()


def test_a_key_of_a_tree_that_no_line_can_show(tmp_path: Path):
    save_file(
        {"a": torch.zeros(1)}, tmp_path / "a", {"format": "fgpt", "structure": '{"dict": {"\\u001b[2J": "tensor"}}'}
    )
    with pytest.raises(InputError, match="a key of the tree is") as caught:
        serialization.read_tree(tmp_path / "a")
    assert str(caught.value).isprintable()


def test_a_column_that_is_there_twice(tmp_path: Path):
    (tmp_path / "a.csv").write_text("instruction,output,output\na,b,c\n")
    with pytest.raises(InputError, match="two columns are called 'output'"):
        instruction_datasets.load_rows(tmp_path / "a.csv")


def test_over_a_thousand_files():
    """As many as each test above makes sure of."""
    assert sum(COUNTS.values()) >= 1000
