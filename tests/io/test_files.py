"""Files: quantized trees and any adapters bit by bit, bitsandbytes' own files, and what a run keeps."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from builders import close, hf_gpt2, same, tiny, tokens, with_noise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2LMHeadModel

import fgpt
from fgpt.cli import run_dir
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.io.files import atomic_dir, must_not_move, read_json, remove, remove_leftovers, write, write_json
from fgpt.kernels.quantized_linear import QUANTIZED, Blockwise4bit, RowwiseInt8
from fgpt.model import FusedAttention
from fgpt.tree import astype, tree_map, walk

X = tokens(31, 2, 9)


def identical(a: Any, b: Any) -> None:
    """Asserts the same nodes with the same static fields, and bitwise the same tensors."""
    assert pytree.tree_structure(a) == pytree.tree_structure(b)
    x, y = pytree.tree_leaves(a), pytree.tree_leaves(b)
    assert all(p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(x, y, strict=True))


def wide(**overrides: Any) -> fgpt.GPT:
    return tiny(**{"d_model": 64, "d_mlp": 128} | overrides)


# ------------------------------------------------------------------------------------------------------ quantized trees

MIXED = {
    "nf4": lambda p: fgpt.quantize(p),
    "nf4, plain scales": lambda p: fgpt.quantize(p, double_quant=False),
    "fp4": lambda p: fgpt.quantize(p, "fp4"),
    "int8": lambda p: fgpt.quantize(p, "int8"),
    "blockwise8": lambda p: fgpt.quantize(p, "blockwise8"),
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
    params = MIXED[kind](fgpt.fuse_qkv(wide(tie_word_embeddings=tied)) if whole else wide(tie_word_embeddings=tied))
    assert any(isinstance(x, QUANTIZED) for _, x in walk(params))
    fgpt.save(params, tmp_path)
    again = fgpt.load(str(tmp_path))
    identical(again, params)
    assert torch.equal(fgpt.apply(again, X), fgpt.apply(params, X))


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
        for again in (False, True):  # gone, and another in its place
            with pytest.raises(InputError, match="was renamed or deleted"):
                write(tmp_path / "run" / "a" / "y", "2")
            with pytest.raises(InputError, match="was renamed or deleted"), atomic_dir(tmp_path / "run" / "b"):
                pass
            assert not again or not list((tmp_path / "run").iterdir())
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
    params = fgpt.quantize(astype(wide(), torch.bfloat16))
    fgpt.save(params, tmp_path)
    identical(fgpt.load(str(tmp_path), dtype=None), params)
    fp32 = fgpt.load(str(tmp_path))
    assert {x.dtype for _, x in walk(fp32) if isinstance(x, Blockwise4bit)} == {torch.float32}
    assert fp32.blocks[0].ln_1.w.dtype == torch.float32
    assert fgpt.apply(fp32, X).dtype == torch.float32
    w, v = (p.blocks[1].mlp.up.w for p in (fp32, params))
    assert same(w, v)  # codes and scales are as they were; the numbers are no longer rounded to bfloat16
    assert torch.equal(fgpt.dense(w).bfloat16(), fgpt.dense(v))
    identical(fgpt.load(str(tmp_path), dtype=torch.bfloat16), params)  # scales of scales mean fp32 as before


def test_others_refuse_a_quantized_folder(tmp_path: Path):
    """transformers fills in what a model.safetensors of other names lacks with random numbers: it must find none."""
    plain = wide()
    fgpt.save(plain, tmp_path, like="nano")
    fgpt.save(fgpt.quantize(plain), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert models._config(models._open(tmp_path)) == plain.cfg
    fgpt.save(plain, tmp_path)
    assert same(fgpt.load(str(tmp_path)), plain)  # not the quantized one of before
    assert GPT2LMHeadModel.from_pretrained(tmp_path).config.n_embd == 64


def test_a_fresh_process_computes_with_what_it_loads(tmp_path: Path):
    """bitsandbytes' operators are there, though nothing was quantized."""
    params = fgpt.quantize(wide(n_layer=1))
    fgpt.save(params, tmp_path)
    code = "import sys, torch, fgpt; print(fgpt.apply(fgpt.load(sys.argv[1]), torch.tensor([[1, 2, 3]])).sum().item())"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=run_dir.__file__.rsplit("/", 2)[0])
    expected = fgpt.apply(params, torch.tensor([[1, 2, 3]])).sum().item()
    assert float(said.stdout) == pytest.approx(expected, abs=1e-4)


def test_adapted_params_are_not_saved(tmp_path: Path):
    params = fgpt.quantize(wide())
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
    params, quantized = wide(n_layer=1, vocab_size=4096), kind(str(tmp_path / "quantized"))
    adapters = fgpt.lora(params, fgpt.key(0))
    model, peft, whole = (kind(str(tmp_path / name)) for name in ("model", "peft", "adapters.safetensors"))
    fgpt.save(params, model, like="nano")
    assert same(fgpt.load(model), params)
    assert fgpt.tokenizer(model).encode("so") == fgpt.tokenizer("nano").encode("so")
    fgpt.save(fgpt.quantize(params), quantized, like=model)
    identical(fgpt.load(quantized), fgpt.quantize(params))
    assert fgpt.tokenizer(quantized).encode("so") == fgpt.tokenizer("nano").encode("so")
    fgpt.save_peft(adapters, params, peft, "nano")
    assert same(fgpt.load_peft(peft, params), adapters)
    fgpt.save_adapters(adapters, whole)
    assert same(fgpt.load_adapters(whole, params), adapters)
    for read in (fgpt.load, fgpt.tokenizer, lambda x: fgpt.load_peft(x, params)):
        with pytest.raises(fgpt.InputError, match="nowhere"):
            read(kind(str(tmp_path / "nowhere")))


# ------------------------------------------------------------------------------------------------------- any adapters


def union(params: fgpt.GPT) -> fgpt.Adapters:
    """Every kind, and a LoRA whose B and a bias whose path would both be called blocks.0.attn.q.b."""
    key = fgpt.key(0)
    return with_noise(
        fgpt.lora(params, key, 3, target=r"blocks\.0\.attn\.q", rs=True, dropout=0.1)
        | fgpt.trainable_leaves(params, r"blocks\.0\.attn\.q\.b|.*ln_.*")
        | fgpt.dora(params, key, 2, target=r"blocks\.1\.attn\..|wte")
        | fgpt.ia3(params, r".*\.0\.attn\.k", r".*\.down")
    )


def test_any_union_of_adapters_comes_back_bit_by_bit(tmp_path: Path):
    params = wide()
    adapters = union(params)
    fgpt.save_adapters(adapters, tmp_path / "a.safetensors")
    again = fgpt.load_adapters(tmp_path / "a.safetensors", params)
    identical(again, adapters)
    whole = load_file(tmp_path / "a.safetensors")
    whole["blocks.0.attn.q/b"] = torch.zeros(64, 4)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        save_file(whole, tmp_path / "b.safetensors", file.metadata())
    with pytest.raises(fgpt.InputError, match=r"blocks\.0\.attn\.q/b: expected Float.*out rank.*got .* \[64, 4\]"):
        fgpt.load_adapters(tmp_path / "b.safetensors", params)
    other = wide(d_model=32)
    with pytest.raises(fgpt.InputError, match=r"a\.safetensors: .* but the base has"):
        fgpt.load_adapters(tmp_path / "a.safetensors", other)
    fgpt.save(fgpt.quantize(params), tmp_path)
    with pytest.raises(fgpt.InputError, match="expected adapters, got GPT"):
        fgpt.load_adapters(tmp_path / "fgpt.safetensors", params)


# ------------------------------------------------------------------------------------------------------- corrupt files

Q, K = "blocks.0.attn.q", "blocks.0.attn.k"
Edit = Callable[[dict[str, Tensor], Any], Any]


def put(name: str, x: Any) -> Edit:
    def edit(tensors: dict[str, Tensor], structure: Any) -> None:
        tensors[name] = x if isinstance(x, Tensor) else x(tensors[name])

    return edit


def field(*path: Any) -> Edit:
    """The structure with the value at path[:-1] replaced by path[-1]."""

    def edit(tensors: dict[str, Tensor], structure: Any) -> None:
        for step in path[:-2]:
            structure = structure[step]
        structure[path[-2]] = path[-1]

    return edit


W = ("GPT", "blocks", "tuple", 0, "Block", "attn", "Attention", "q", "Linear", "w")
SPOILED: dict[str, tuple[Edit, str]] = {
    "missing": (lambda t, s: t.pop(f"{Q}.w.codes"), rf"tensor {Q}\.w\.codes is missing"),
    "surplus": (put("extra", torch.zeros(1)), "tensor extra has no place in the structure"),
    "dtype": (
        put(f"{Q}.w.codes", lambda x: x.float()),
        rf"{Q}\.w\.codes: expected UInt8.*got torch.float32 \[64, 32\]",
    ),
    "axes": (put(f"{Q}.w.codes", lambda x: x.view(-1)), rf"{Q}\.w\.codes: expected UInt8.*got torch.uint8 \[2048\]"),
    "code": (put(f"{Q}.w.code", lambda x: x[:8]), rf"{Q}\.w\.code: expected"),
    "blocks": (put(f"{Q}.w.absmax.codes", lambda x: x[:9]), r"want \d+ scales"),
    "scales": (put(f"{Q}.w.absmax.absmax", lambda x: x.half()), "scales and code of a quantized weight are float32"),
    "rows": (put(f"{Q}.b", lambda x: x[:9]), rf"{Q}\.b: expected shape \[64\], got \[9\]"),
    "narrow": (put(f"{Q}.w.codes", lambda x: x.view(32, 64)), rf"{Q}\.w: expected shape \[64, 64\], got \[32, 128\]"),
    "whole numbers": (put("wte.w", lambda x: x.int()), r"wte\.w: expected a floating dtype, got torch\.int32"),
    "node": (field(*W, {"Popen": {}}), rf'{Q}\.w is {{"Popen": {{}}}}; expected a tensor, dict, tuple or known node'),
    "place": (field(*W[:-2], {"tuple": []}), rf"{Q}: expected Linear, got \(\)"),
    "field": (field(*W, "Blockwise4bit", "color", "tensor"), r"Blockwise4bit has no field 'color'"),
    "kind": (field(*W, "Blockwise4bit", "kind", "nf5"), rf"{Q}\.w\.kind: expected .*got 'nf5'"),
    "static dtype": (field(*W, "Blockwise4bit", "dtype", "nn"), rf"{Q}\.w\.dtype: expected dtype, got <module"),
    "offset": (
        lambda t, s: (t.pop(f"{Q}.w.offset"), _at(s, *W, "Blockwise4bit").pop("offset")),
        "an offset to quantized scales only",
    ),
    "nothing": (field(*W[:-1], {}), rf"{Q}\.w: expected .*got None"),
    "config": (field("GPT", "cfg", "n_head", 4), r"is a model of n_head=4, but config\.json says n_head=2"),
    "config's type": (field("GPT", "cfg", "n_head", "2"), r"cfg: expected Config, got"),
    "layers": (lambda t, s: _drop_block(t, s), r"blocks\.1 is missing: not a whole model of its config"),
    "depth": (field(*W, "deep"), "expected a tensor, dict, tuple or known node"),
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
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    fgpt.save(fgpt.quantize(wide()), path)
    return path


def copied(saved: Path, to: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    (to / "config.json").write_bytes((saved / "config.json").read_bytes())
    with safe_open(saved / "fgpt.safetensors", framework="pt") as file:
        return load_file(saved / "fgpt.safetensors"), file.metadata()


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_file_gets_one_typed_line(name: str, saved: Path, tmp_path: Path):
    tensors, metadata = copied(saved, tmp_path)
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
def test_other_structures_are_refused(metadata: dict[str, str], expected: str, saved: Path, tmp_path: Path):
    tensors, _ = copied(saved, tmp_path)
    save_file(tensors, tmp_path / "fgpt.safetensors", metadata)
    with pytest.raises(fgpt.InputError, match=expected):
        fgpt.load(str(tmp_path))


def test_a_file_of_an_older_config_is_read(saved: Path, tmp_path: Path):
    """Fields that Config has since then have their defaults; those that it always had must be there."""
    tensors, metadata = copied(saved, tmp_path)
    structure = json.loads(metadata["structure"])
    cfg = structure["GPT"]["cfg"]
    for name in ("sliding_window", "full_layers", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
        del cfg[name]
    save_file(tensors, tmp_path / models.TREE, metadata | {"structure": json.dumps(structure)})
    identical(fgpt.load(str(tmp_path)), fgpt.load(str(saved)))
    del cfg["tie_word_embeddings"]
    save_file(tensors, tmp_path / models.TREE, metadata | {"structure": json.dumps(structure)})
    with pytest.raises(fgpt.InputError, match="cfg: expected Config, got"):
        fgpt.load(str(tmp_path))


@pytest.mark.parametrize("stretch", [[4.0, 32.0, 1.0], [4.0, "32", 1.0, 6.0, 1.2, True], [2.0, "8"], "yarn"])
def test_a_rope_of_other_numbers_is_refused(stretch: Any, saved: Path, tmp_path: Path):
    tensors, metadata = copied(saved, tmp_path)
    structure = json.loads(metadata["structure"])
    structure["GPT"]["cfg"]["rope_scaling"] = stretch
    save_file(tensors, tmp_path / models.TREE, metadata | {"structure": json.dumps(structure)})
    with pytest.raises(fgpt.InputError, match="cfg: expected Config, got"):
        fgpt.load(str(tmp_path))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(keep: float, saved: Path, tmp_path: Path):
    copied(saved, tmp_path)
    data = (saved / "fgpt.safetensors").read_bytes()
    (tmp_path / "fgpt.safetensors").write_bytes(data[: int(keep * len(data))])
    with pytest.raises(fgpt.InputError, match="not a whole safetensors file"):
        fgpt.load(str(tmp_path))


# ------------------------------------------------------------------------------------------------ bitsandbytes' files

PLAIN = "transformer.h.0.attn.c_attn.weight"
STATE = f"{PLAIN}.quant_state.bitsandbytes__nf4"


def theirs(path: Path, width: int, **options: Any) -> GPT2LMHeadModel:
    """A GPT-2 that transformers has loaded through bitsandbytes and saved, with no dropout."""
    off: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    hf_gpt2(n_embd=width, n_layer=1, **off).save_pretrained(path / "plain")
    config = BitsAndBytesConfig(**options)
    model = GPT2LMHeadModel.from_pretrained(path / "plain", quantization_config=config, device_map="cpu")
    model.save_pretrained(path / "quantized")
    return model


def numbers(layer: Any) -> Tensor:
    """The matrix that a layer of bitsandbytes means, by its own functions."""
    w = layer.weight
    return dequantize_4bit(w.data, w.quant_state) if hasattr(w, "quant_state") else int8_vectorwise_dequant(w, w.SCB)


def matrices(p: fgpt.GPT) -> dict[str, Tensor]:
    attn, mlp = p.blocks[0].attn, p.blocks[0].mlp
    parts = [attn.qkv] if hasattr(attn, "qkv") else [attn.q, attn.k, attn.v]  # pyright: ignore
    whole = torch.cat([fgpt.dense(x.w) for x in parts])
    rest = {"attn.c_proj": attn.o, "mlp.c_fc": mlp.up, "mlp.c_proj": mlp.down}
    return {"attn.c_attn": whole} | {name: fgpt.dense(x.w) for name, x in rest.items()}


@pytest.mark.parametrize(
    ("width", "kind", "double", "storage", "fused"),
    [
        (64, "nf4", True, "uint8", True),  # 64 blocks in each of q, k and v, but their scales go by 256
        (128, "nf4", True, "uint8", False),
        (64, "fp4", False, "uint8", False),
        (128, "nf4", True, "bfloat16", False),
    ],
)
def test_four_bits_of_bitsandbytes(width: int, kind: str, double: bool, storage: str, fused: bool, tmp_path: Path):
    options = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double, "bnb_4bit_quant_storage": storage}
    model = theirs(tmp_path, width, load_in_4bit=True, **options)
    assert load_file(tmp_path / "quantized" / "model.safetensors")[PLAIN].dtype == getattr(torch, storage)
    params = fgpt.load(str(tmp_path / "quantized"))
    assert isinstance(params.blocks[0].attn, FusedAttention) == fused
    expected = {name: numbers(model.transformer.h[0].get_submodule(name)) for name in matrices(params)}
    for name, w in matrices(params).items():
        assert torch.equal(w, expected[name]), name
    held = [x for _, x in walk(params) if isinstance(x, Blockwise4bit)]
    assert len(held) == (4 if fused else 6)
    assert all(isinstance(x.absmax, Tensor) != double and x.kind == kind for x in held)
    model.train()  # in eval mode bitsandbytes multiplies in bfloat16 on some CPUs
    with torch.no_grad():
        close(fgpt.apply(params, X), model(X).logits, 1e-5)
    adapters = fgpt.lora(params, fgpt.key(0), target=r".*\.(q|v|qkv)")
    assert fgpt.apply(fgpt.adapt(params, adapters), X).isfinite().all()
    fgpt.save(params, tmp_path / "again")
    identical(fgpt.load(str(tmp_path / "again")), params)


def test_eight_bits_of_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, registered = theirs(tmp_path, 64, load_in_8bit=True), []
    monkeypatch.setattr("fgpt.io.bitsandbytes.register", lambda: registered.append(True))
    params = fgpt.load(str(tmp_path / "quantized"))
    assert registered
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    attn: Any = params.blocks[0].attn
    assert all(isinstance(x.w, RowwiseInt8) for x in (attn.q, attn.k, attn.v, attn.o))
    codes, scales = (torch.cat([getattr(x.w, name) for x in (attn.q, attn.k, attn.v)]) for name in ("codes", "absmax"))
    assert torch.equal(codes, stored[PLAIN])
    assert torch.equal(scales, stored[PLAIN.replace("weight", "SCB")])
    for name, w in matrices(params).items():  # c·s/127 in another order of rounding
        torch.testing.assert_close(w, numbers(model.transformer.h[0].get_submodule(name)), rtol=3e-7, atol=0)


def test_a_head_apart_beside_four_bits(tmp_path: Path):
    """bitsandbytes leaves a tied head plain; one that was trained and merged afterwards is kept."""
    model = theirs(tmp_path, 64, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    path = tmp_path / "quantized" / "model.safetensors"
    head = model.lm_head.weight.detach().float() + with_noise({"head": torch.zeros(31, 64)})["head"]
    save_file(load_file(path) | {"lm_head.weight": head}, path, {"format": "pt"})
    params = fgpt.load(str(tmp_path / "quantized"))
    assert params.head is not None
    assert torch.equal(params.head.w, head)  # pyright: ignore[reportArgumentType]
    fgpt.save(params, tmp_path / "again")
    identical(fgpt.load(str(tmp_path / "again")), params)


def stated(**changes: Any) -> Callable[[Tensor], Tensor]:
    """A packed state with other fields."""
    return lambda x: torch.tensor(list(json.dumps(json.loads(bytes(x.tolist())) | changes).encode()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nested")
    theirs(path, 64, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return path / "quantized"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (PLAIN, None, "c_attn.weight is missing, but .* of it are there"),
        (f"{PLAIN}.absmax", None, "c_attn.weight.absmax is missing"),
        (f"{PLAIN}.nested_quant_map", None, "nested_quant_map is missing"),
        (f"{PLAIN}.absmax", lambda x: x[:-1], "want 192 scales, got 191"),
        (f"{PLAIN}.absmax", lambda x: x.float(), "absmax: expected uint8 and a map of 256 values, got float32"),
        (f"{PLAIN}.nested_absmax", lambda x: torch.cat([x, x]), "want 1 scales, got 2"),
        (f"{PLAIN}.quant_map", lambda x: x.flip(0), "not the values of nf4"),
        (PLAIN, lambda x: x[:-64], r"do not make a 4-bit matrix of \[192, 64\]"),
        (STATE, None, "expected one quant_state.bitsandbytes__nf4 or fp4 beside it, got none"),
        (STATE, lambda x: x[:9], "not the state of a 4-bit matrix"),
        (STATE, stated(blocksize=128), "expected blocks of 64, bitsandbytes' default, got 128"),
        (STATE, stated(nested_blocksize=300), "block is 300; expected one of 64"),
        (STATE, stated(quant_type="nf5"), "quant_type is 'nf5'; expected 'nf4' or 'fp4'"),
        (STATE, stated(shape=[64, 192]), r"c_attn.weight: expected shape \[192, 64\], got \[64, 192\]"),
        (STATE, stated(dtype="int8"), "not the state of a 4-bit matrix"),
    ],
)
def test_a_spoiled_file_of_bitsandbytes(name: str, change: Any, expected: str, nested: Path, tmp_path: Path):
    tensors = load_file(nested / "model.safetensors")
    part = tensors.pop(name)
    tensors |= {} if change is None else {name: change(part).contiguous()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((nested / "config.json").read_bytes())
    with pytest.raises(fgpt.InputError, match=expected) as caught:
        fgpt.load(str(tmp_path))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- what a run keeps

KEPT: dict[str, tuple[Callable[[fgpt.GPT], fgpt.Adapters], str]] = {
    "lora": (lambda p: fgpt.lora(p, fgpt.key(0), target=r".*\.(q|v)"), "adapter/adapter_model.safetensors"),
    "dora": (lambda p: fgpt.dora(p, fgpt.key(0), target=r".*\.(q|v)"), "adapter/adapter_model.safetensors"),
    "ia3": (fgpt.ia3, "adapter/adapter_model.safetensors"),
    "norms": (lambda p: fgpt.trainable_leaves(p, r".*ln_.*"), "adapter/adapter_model.safetensors"),
    "biases": (lambda p: fgpt.trainable_leaves(p, r".*\.b"), "adapter/adapters.safetensors"),
    "a union": (union, "adapter/adapters.safetensors"),
    "full": (fgpt.trainable_leaves, "model/model.safetensors"),
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_run_keeps_is_what_it_tuned(kind: str, dtype: torch.dtype, tmp_path: Path):
    make, file = KEPT[kind]
    base = astype(wide(), dtype)
    adapters = with_noise(make(base), 0.1)
    tuned = fgpt.adapt(base, adapters)
    released = tree_map(lambda x: x.to("meta"), base) if kind == "full" else base  # as training lets go of them
    run_dir.save_tuned(tmp_path, released, adapters, "nano")
    assert (tmp_path / file).is_file()
    again = run_dir.load_tuned(tmp_path, base)
    assert pytree.tree_structure(again) == pytree.tree_structure(tuned)
    close(again, tuned, 1e-6)  # DoRA's row norms may round otherwise where a file puts the tensors
    assert not torch.equal(fgpt.apply(base, X), fgpt.apply(tuned, X))


def test_a_whole_model_goes_where_the_base_is(tmp_path: Path):
    base = wide()
    run_dir.save_tuned(tmp_path, base, fgpt.trainable_leaves(base), "nano")
    there = tree_map(lambda x: x.to("meta"), astype(base, torch.float16))  # a device that every machine has
    assert {(x.device.type, x.dtype) for x in pytree.tree_leaves(run_dir.load_tuned(tmp_path, there))} == {
        ("meta", torch.float16)
    }


def test_adapters_over_a_quantized_base(tmp_path: Path):
    base = fgpt.quantize(wide())
    adapters = with_noise(fgpt.lora(base, fgpt.key(0)) | fgpt.trainable_leaves(base, r".*\.b"), 0.1)
    run_dir.save_tuned(tmp_path, base, adapters, "nano")
    identical(run_dir.load_tuned(tmp_path, base), fgpt.adapt(base, adapters))
