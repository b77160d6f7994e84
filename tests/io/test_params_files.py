"""Files of params: quantized trees bit by bit, folders that are links or were moved, paths of any kind."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import same, tokens
from builders.params_files import assert_trees_identical, wide_gpt
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import fgpt
from fgpt.cli import run_dir
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.io.files import atomic_dir, must_not_move, read_json, remove, remove_leftovers, write, write_json
from fgpt.kernels.quantized_linear import QUANTIZED, Blockwise4bit
from fgpt.tree import astype, walk

X = tokens(31, 2, 9)


# ------------------------------------------------------------------------------------------------------ quantized trees


MIXED = {
    "nf4": lambda p: fgpt.quantize(p),
    "nf4, plain scales": lambda p: fgpt.quantize(p, double_quant=False),
    "fp4": lambda p: fgpt.quantize(p, "fp4"),
    "int8": lambda p: fgpt.quantize(p, "int8"),
    "blockwise8": lambda p: fgpt.quantize(p, "blockwise8"),
    "rotated int8": lambda p: fgpt.quantize(p, "int8", rotate=True),
    "rotated nf4": lambda p: fgpt.quantize(p, "nf4", rotate=True),
    "the table": lambda p: fgpt.quantize(p, "int8", target="wte"),
    "all, mixed": lambda p: fgpt.quantize(
        fgpt.quantize(fgpt.quantize(p, "nf4", target=r".*\.0\.attn\..*"), "int8", target=r".*\.down"),
        "blockwise8",
        target=r".*\.1\.attn\..*|wte|head" if p.head else r".*\.1\.attn\..*|wte",
    ),
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_tree_comes_back_bit_by_bit(kind: str, whole: bool, tied: bool, tmp_path: Path):
    params = MIXED[kind](
        fgpt.fuse_qkv(wide_gpt(tie_word_embeddings=tied)) if whole else wide_gpt(tie_word_embeddings=tied)
    )
    assert any(isinstance(x, QUANTIZED) for _, x in walk(params))
    fgpt.save(params, tmp_path)
    replaced = fgpt.load(str(tmp_path))
    assert_trees_identical(replaced, params)
    assert torch.equal(fgpt.apply(replaced, X), fgpt.apply(params, X))


def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path: Path):
    text = "half \ud83d, whole \U0001f98a"
    write(tmp_path / "a.md", text)
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "half \\ud83d, whole \U0001f98a"
    write_json(tmp_path / "a.json", {text: [text]})
    assert read_json(tmp_path / "a.json") == {text: [text]}  # JSON reads its own escape


def test_a_folder_that_moved_is_not_made_anew(tmp_path: Path):
    (tmp_path / "run").mkdir()
    with must_not_move(tmp_path / "run"):
        write(tmp_path / "run" / "a" / "x", "1")
        (tmp_path / "run").rename(tmp_path / "moved")
        for replaced in (False, True):  # gone, and another in its place
            with pytest.raises(InputError, match="was renamed or deleted"):
                write(tmp_path / "run" / "a" / "y", "2")
            with pytest.raises(InputError, match="was renamed or deleted"), atomic_dir(tmp_path / "run" / "b"):
                pass
            assert not replaced or not list((tmp_path / "run").iterdir())
            (tmp_path / "run").mkdir(exist_ok=True)
        write(tmp_path / "other", "3")
    write(tmp_path / "run" / "a" / "y", "2")


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis").write_text("mine")
    for target in (outside, tmp_path / "nowhere"):
        (tmp_path / "a").symlink_to(target)
        with atomic_dir(tmp_path / "a") as at:
            (at / "x").write_text("1")
        assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]
        assert not (tmp_path / "a").is_symlink()
        remove(tmp_path / "a")
    (tmp_path / "b").symlink_to(outside / "thesis")
    write(tmp_path / "b", "2")
    assert (outside / "thesis").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "outside"]


def test_a_folder_that_was_put_aside_comes_back(tmp_path: Path):
    """A kill between the two renames of a replacement leaves the old one and the new one under temporary names."""
    for name in (".a.abcd1234.fgpt-aside", ".a.abcd1234.fgpt-partial", ".b.abcd1234.fgpt-aside", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    (tmp_path.parent / "link").symlink_to(tmp_path)
    remove_leftovers(tmp_path.parent / "link")
    assert len(list(tmp_path.iterdir())) == 4  # nothing behind a link is touched
    remove_leftovers(tmp_path)
    assert {p.name: (p / "x").read_text() for p in tmp_path.iterdir()} == {"a": ".a.abcd1234.fgpt-aside", "b": "b"}


def test_dtypes_stay_or_change_together(tmp_path: Path):
    params = fgpt.quantize(astype(wide_gpt(), torch.bfloat16))
    fgpt.save(params, tmp_path)
    assert_trees_identical(fgpt.load(str(tmp_path), dtype=None), params)
    fp32 = fgpt.load(str(tmp_path))
    assert {x.dtype for _, x in walk(fp32) if isinstance(x, Blockwise4bit)} == {torch.float32}
    assert fp32.blocks[0].ln_1.w.dtype == torch.float32
    assert fgpt.apply(fp32, X).dtype == torch.float32
    w, v = (p.blocks[1].mlp.up.w for p in (fp32, params))
    assert same(w, v)  # codes and scales are as they were; the numbers are no longer rounded to bfloat16
    assert torch.equal(fgpt.dense(w).bfloat16(), fgpt.dense(v))
    assert_trees_identical(
        fgpt.load(str(tmp_path), dtype=torch.bfloat16), params
    )  # scales of scales mean fp32 as before


def test_others_refuse_a_quantized_folder(tmp_path: Path):
    """transformers fills in what a model.safetensors of other names lacks with random numbers: it must find none."""
    plain = wide_gpt()
    fgpt.save(plain, tmp_path, like="nano")
    fgpt.save(fgpt.quantize(plain), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert models._config(models._open(tmp_path)) == plain.cfg
    fgpt.save(plain, tmp_path)
    assert same(fgpt.load(str(tmp_path)), plain)  # not the quantized one of before
    assert GPT2LMHeadModel.from_pretrained(tmp_path).config.n_embd == 64


@pytest.mark.slow
def test_a_fresh_process_computes_with_what_it_loads(tmp_path: Path):
    """bitsandbytes' operators are there, though nothing was quantized."""
    params = fgpt.quantize(wide_gpt(n_layer=1))
    fgpt.save(params, tmp_path)
    code = "import sys, torch, fgpt; print(fgpt.apply(fgpt.load(sys.argv[1]), torch.tensor([[1, 2, 3]])).sum().item())"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    process = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=run_dir.__file__.rsplit("/", 2)[0]
    )
    expected = fgpt.apply(params, torch.tensor([[1, 2, 3]])).sum().item()
    assert float(process.stdout) == pytest.approx(expected, abs=1e-4)


def test_adapted_params_are_not_saved(tmp_path: Path):
    params = fgpt.quantize(wide_gpt())
    adapted = fgpt.adapt(params, fgpt.lora(params, fgpt.key(0)))
    with pytest.raises(fgpt.InputError, match=r"attn\.q\.w is Adapted.*merge\(params\) first"):
        fgpt.save(adapted, tmp_path)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- paths


class Place:
    """A path of somebody's own."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return self.path


@pytest.mark.parametrize("kind", [str, Path, Place])
def test_paths_of_any_kind(kind: Callable[[str], Any], tmp_path: Path):
    """Whatever takes a path takes a str, a Path, or another PathLike."""
    params, quantized = wide_gpt(n_layer=1, vocab_size=4096), kind(str(tmp_path / "quantized"))
    adapters = fgpt.lora(params, fgpt.key(0))
    model, peft, whole = (kind(str(tmp_path / name)) for name in ("model", "peft", "adapters.safetensors"))
    fgpt.save(params, model, like="nano")
    assert same(fgpt.load(model), params)
    assert fgpt.tokenizer(model).encode("so") == fgpt.tokenizer("nano").encode("so")
    fgpt.save(fgpt.quantize(params), quantized, like=model)
    assert_trees_identical(fgpt.load(quantized), fgpt.quantize(params))
    assert fgpt.tokenizer(quantized).encode("so") == fgpt.tokenizer("nano").encode("so")
    fgpt.save_peft(adapters, params, peft, "nano")
    assert same(fgpt.load_peft(peft, params), adapters)
    fgpt.save_adapters(adapters, whole)
    assert same(fgpt.load_adapters(whole, params), adapters)
    for read in (fgpt.load, fgpt.tokenizer, lambda x: fgpt.load_peft(x, params)):
        with pytest.raises(fgpt.InputError, match="nowhere"):
            read(kind(str(tmp_path / "nowhere")))
