"""Files with the names that classes and fields had before version 0.1."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fgpt
from fgpt.cli.run_json import read_run, write_run
from fgpt.data.classification_prompts import PromptWording
from fgpt.errors import InputError
from fgpt.io.serialization import read_tree, write_tree
from fgpt.kernels.rotary import YarnScaling
from fgpt.recipes import AnyRecipe
from fgpt.recipes.classification import ClassificationRecipe
from fgpt.recipes.instruction import InstructionRecipe
from fgpt.recipes.pretraining import PretrainingRecipe
from fgpt.tree import astype, leaves

OLDER = Path(__file__).parent / "older_names.safetensors"


def same_tree() -> fgpt.GPT:
    """The tree in the older file, made anew."""
    cfg = fgpt.Config(
        n_layer=1,
        n_head=1,
        d_model=64,
        n_ctx=16,
        vocab_size=8,
        d_mlp=8,
        d_head=8,
        activation="silu",
        norm_type="rms",
        norm_eps=1e-6,
        n_norms=1,
        gated_mlp=True,
        parallel_residual=True,
        biases=frozenset({"q", "k", "v"}),
        rotary_dim=8,
        interleaved=True,
        rope_theta=5000.0,
        rope_scaling=YarnScaling(2.0, 32.0, 1.0, 8.0, 1.1),
        tie_word_embeddings=False,
    )
    params = astype(fgpt.init(cfg, fgpt.key(0)), torch.bfloat16)
    params = fgpt.quantize(params, "nf4", target=r"blocks\.0\.attn\.q")
    params = fgpt.quantize(params, "int8", target=r"blocks\.0\.attn\.k")
    return fgpt.quantize(params, "blockwise8", target=r"blocks\.0\.attn\.v")


def assert_equal_trees(got: Any, expected: Any) -> None:
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    for path, x in leaves(expected).items():
        assert torch.equal(leaves(got)[path], x), path


def structure(path: Path) -> str:
    """The structure in the header of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"]["structure"]


def test_a_tree_with_older_names_is_read():
    names = ("FourBit", "Blockwise8", "Rowwise8", "stretch", '"biases": "q k v"')
    assert all(name in structure(OLDER) for name in names)
    assert_equal_trees(read_tree(OLDER), same_tree())


def test_it_is_written_with_the_new_names(tmp_path: Path):
    write_tree(tmp_path / "tree.safetensors", read_tree(OLDER))
    text = structure(tmp_path / "tree.safetensors")
    assert '"biases": ["k", "q", "v"]' in text
    assert not any(name in text for name in ('"FourBit"', '"Blockwise8"', '"Rowwise8"', '"stretch"', '"context"'))
    assert_equal_trees(read_tree(tmp_path / "tree.safetensors"), same_tree())


def test_a_bias_of_no_layer_is_refused():
    with pytest.raises(InputError, match="no layer 'wte' for a bias: expected a set of down, gate, head"):
        fgpt.init(fgpt.Config(1, 1, 8, 8, 8, 8, biases=frozenset({"wte"})), fgpt.key(0))
    with pytest.raises(InputError, match="no layer ' ' for a bias"):
        fgpt.init(fgpt.Config(1, 1, 8, 8, 8, 8, biases=frozenset("q k v")), fgpt.key(0))


OLDER_FIELDS = {
    "name": "mine",
    "seq": 100,
    "rows": 3,
    "accumulate": 2,
    "warmup": 5,
    "evaluate": 10,
    "take": "best",
    "checkpoint": 1.5,
    "keep": 4,
    "track": "wandb",
}
FIELDS: dict[str, Any] = {
    "name": "mine",
    "max_seq_len": 100,
    "micro_batch_size": 3,
    "grad_accumulation_steps": 2,
    "warmup_steps": 5,
    "eval_every": 10,
    "keep_best": True,
    "checkpoint_every_minutes": 1.5,
    "keep_checkpoints": 4,
    "tracker": "wandb",
}
OLDER_RUNS: dict[str, tuple[dict[str, Any], AnyRecipe]] = {
    "instruction": (
        {"base": "nano", "data": "alpaca", "long": "drop", "heldout": 7, "compare": 6, "most": 9},
        InstructionRecipe(
            **FIELDS,
            base="nano",
            data=("alpaca",),
            template="alpaca",
            overlong="drop",
            num_heldout=7,
            compare_prompts=6,
            max_new_tokens=9,
        ),
    ),
    "classification": (
        {
            "base": "nano",
            "train": "emotion",
            "heldout": 7,
            "form": "tokens",
            "wording": {"instruction": "Sort.", "prefix": "Text:", "suffix": "So:"},
            "shots": 2,
            "also": r".*\.b",
        },
        ClassificationRecipe(
            **FIELDS,
            base="nano",
            train="emotion",
            num_heldout=7,
            head="lm",
            prompt=PromptWording("Sort.", "Text:", "So:"),
            num_fewshot=2,
            tune_also=r".*\.b",
        ),
    ),
    "pretraining": (
        {"data": ["a.txt"], "heldout": "b.txt", "n_layer": 2, "floor": 0.25, "peak": 3.5, "biases": False},
        PretrainingRecipe(
            **FIELDS,
            data=(Path("a.txt"),),
            heldout=Path("b.txt"),
            n_layer=2,
            min_lr_ratio=0.25,
            peak_tflops=3.5,
            biases=False,
        ),
    ),
}


@pytest.mark.parametrize("kind", OLDER_RUNS)
def test_a_run_without_a_version_is_read(kind: str, tmp_path: Path):
    fields, expected = OLDER_RUNS[kind]
    expected = dataclasses.replace(expected, dtype="float32")  # what all of them were computed in
    (tmp_path / "run.json").write_text(json.dumps(OLDER_FIELDS | fields))
    assert read_run(tmp_path) == expected
    write_run(tmp_path, expected)
    assert read_run(tmp_path) == expected
    last = OLDER_FIELDS | fields | {"take": "last"}
    (tmp_path / "run.json").write_text(json.dumps(last))
    assert read_run(tmp_path) == dataclasses.replace(expected, keep_best=False)


def test_a_run_without_a_version_may_have_no_other_field(tmp_path: Path):
    fields, _ = OLDER_RUNS["classification"]
    for wrong, message in (({"swiglu": 1}, "unknown field 'swiglu'"), ({"form": []}, r"head is \[\]: expected")):
        (tmp_path / "run.json").write_text(json.dumps(OLDER_FIELDS | fields | wrong))
        with pytest.raises(InputError, match=message):
            read_run(tmp_path)
