"""Files in bitsandbytes' layout: transformers and its bitsandbytes read what we have quantized, and so do we."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import close, hf_gpt2, tokens
from builders.hf_models import hf_model, save_and_load
from transformers import AutoModelForCausalLM

import fgpt
from fgpt.families import family_of
from fgpt.families.mapping import split
from fgpt.io.bitsandbytes import to_bitsandbytes
from fgpt.kernels.quantized_linear import quantize_matrix
from fgpt.layers import weight_matrices
from fgpt.tree import leaves, tree_map

X = tokens(31, 2, 9)
SIZES: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 64, "n_inner": 128},
    "neox": {"hidden_size": 64, "intermediate_size": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "qwen3": {"hidden_size": 64, "intermediate_size": 128},
}


def plain_params(name: str) -> fgpt.GPT:
    if name == "gpt2":
        off: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return save_and_load(hf_gpt2(n_embd=64, **off))
    return tree_map(lambda x: 0.5 * x, save_and_load(hf_model(name, **SIZES[name])))


def read_by_transformers(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    for layer in layers_of(model):
        layer.train()  # in eval mode bitsandbytes multiplies in bfloat16 on some CPUs
    return model


def layers_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "Linear4bit"]


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("name", ["gpt2", *SIZES])
def test_transformers_has_the_same_logits_over_four_bits(name: str, format: Any, tmp_path: Path) -> None:
    frozen = fgpt.quantize(plain_params(name), format)
    fgpt.save(frozen, tmp_path, layout="bitsandbytes")
    model = read_by_transformers(tmp_path)
    quantized = [path for path in weight_matrices(frozen) if path.startswith("blocks.")]
    joined = 2 * frozen.cfg.n_layer if name in ("gpt2", "neox") else 0  # q, k and v are one matrix there
    assert len(layers_of(model)) == len(quantized) - joined
    with torch.no_grad():
        close(model(X).logits, fgpt.apply(frozen, X), 1e-4)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "gptq"])
@pytest.mark.parametrize("name", ["gpt2", *SIZES])
def test_we_read_the_same_matrices(name: str, format: Any, tmp_path: Path) -> None:
    plain = plain_params(name)
    batch = fgpt.Batch(tokens(31, 16, 20), tokens(31, 16, 20), torch.ones(16, 20))
    frozen = fgpt.quantize_gptq(plain, [batch], "nf4") if format == "gptq" else fgpt.quantize(plain, format)
    fgpt.save(frozen, tmp_path, layout="bitsandbytes")
    again = fgpt.load(tmp_path)
    expected = leaves(fgpt.merge(frozen, base="dequantized"))
    for path, x in leaves(fgpt.merge(again, base="dequantized")).items():
        assert torch.equal(x, expected[path]), path


def test_a_block_across_two_rows_that_alternate_by_heads_is_named() -> None:
    cfg = plain_params("neox").cfg
    mappings = {s.name: s for s in family_of(cfg).tensor_mappings(cfg)}
    with pytest.raises(fgpt.InputError, match=r"q, k and v alternate by heads, and a block of 64 lies across two rows"):
        split(quantize_matrix(torch.randn(24, 32), "nf4"), mappings["layers.0.attention.query_key_value.weight"], [])


def test_eight_bits_are_those_of_transformers(tmp_path: Path) -> None:
    frozen = fgpt.quantize(plain_params("llama"), "int8")
    fgpt.save(frozen, tmp_path, layout="bitsandbytes")
    model = read_by_transformers(tmp_path)
    w: Any = frozen.blocks[1].mlp.up.w
    theirs = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(theirs.data, w.codes)
    assert torch.equal(theirs.SCB, w.absmax)
    with torch.no_grad():
        difference = (model.eval()(X).logits - fgpt.apply(frozen, X)).abs().max()
    assert difference < 0.1 * fgpt.apply(frozen, X).std()  # both round the inputs to 8 bits, in other ways


def test_a_fused_base_is_written_as_one_that_is_not() -> None:
    plain = plain_params("llama")
    apart, _ = to_bitsandbytes(fgpt.quantize(plain, "nf4", double_quant=False), family_of(plain.cfg))
    fused, _ = to_bitsandbytes(fgpt.quantize(fgpt.fuse_qkv(plain), "nf4", double_quant=False), family_of(plain.cfg))
    assert apart.keys() == fused.keys()
    assert all(torch.equal(x, fused[name]) for name, x in apart.items())


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        (lambda p: p, "bitsandbytes' files hold one format: no weight is quantized"),
        (lambda p: fgpt.quantize(p, "int8", rotate=True), r"blocks\.0\.attn\.q is Rotated: bitsandbytes' files hold"),
        (lambda p: fgpt.quantize(p, "blockwise8"), r"blocks\.0\.attn\.q is Blockwise8bit: bitsandbytes' files hold"),
        (
            lambda p: fgpt.quantize(p, "int8", target="wte"),
            "wte is quantized: bitsandbytes' files hold quantized layers",
        ),
        (
            lambda p: fgpt.quantize(fgpt.quantize(p, "int8", target=r".*\.up"), "nf4", target=r".*\.down"),
            r"hold one format: blocks\.\d\.mlp\.up is int8, blocks\.\d\.mlp\.down is nf4",
        ),
        (
            lambda p: fgpt.quantize(p, "nf4", target=r".*\.(q|down)"),
            r"blocks\.0\.attn\.k is not quantized, but others are that the hub has as one with it: quantize all",
        ),
    ],
)
def test_what_the_layout_has_no_place_for_is_named(quantize: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(fgpt.InputError, match=message):
        fgpt.save(quantize(plain_params("gpt2")), tmp_path, layout="bitsandbytes")
    assert not [*tmp_path.iterdir()]
