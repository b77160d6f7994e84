"""A model that GPTQ quantized: closer than the plainly quantized one, of the same layout, and quantized in order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from builders import close, same, tiny, tokens, with_noise
from builders.hf_models import hf_model, save_and_load
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.gptq import Moments, quantize_by_moments, with_damping
from fgpt.kernels.quantized_linear import Blockwise4bit, Blockwise8bit, quantize_matrix
from fgpt.layer_inputs import input_point, input_rows
from fgpt.layers import weight_matrices
from fgpt.tree import leaves, tree_map

pytestmark = pytest.mark.usefixtures("exact_derivatives")

PLAIN = tiny(d_model=64, d_mlp=128)
TEXT = [tokens(31, 6, 24, seed=seed) for seed in range(3)]
BATCHES = [fgpt.Batch(x, x, torch.ones(x.shape)) for x in TEXT]
NF4 = fgpt.quantize_gptq(PLAIN, BATCHES)
BATCH = fgpt.Batch(TEXT[0], TEXT[1], torch.ones(6, 24))

FAMILIES: dict[str, Callable[[], fgpt.GPT]] = {
    "gpt2": lambda: PLAIN,
    "gpt2, fused": lambda: fgpt.fuse_qkv(PLAIN),
    "gptj": lambda: save_and_load(hf_model("gptj", n_embd=64, n_inner=128)),
    "llama": lambda: save_and_load(hf_model("llama", hidden_size=64, intermediate_size=128)),
    "qwen3, a window in one layer": lambda: save_and_load(
        hf_model("qwen3, a window in one layer", hidden_size=64, intermediate_size=128, head_dim=32)
    ),
}


def inputs_of_layers(params: fgpt.GPT, text: Tensor) -> dict[str, Tensor]:
    """What each layer of the blocks reads, by path."""
    points = {path: input_point(params, path) for path in weight_matrices(params) if path.startswith("blocks.")}
    _, activations = fgpt.trace(params, text, target=r"blocks\..*")
    return {path: input_rows(point, activations[point]).flatten(0, -2) for path, point in points.items()}


def output_errors(params: fgpt.GPT, quantized: fgpt.GPT) -> dict[str, float]:
    """‖X Wᵀ - X̂ Qᵀ‖ of each layer, over the texts."""
    x, y = inputs_of_layers(params, torch.cat(TEXT)), inputs_of_layers(quantized, torch.cat(TEXT))
    matrices, others = weight_matrices(params), weight_matrices(quantized)
    errors: dict[str, float] = {}
    for path in x:
        errors[path] = float((x[path] @ fgpt.dense(matrices[path]).T - y[path] @ fgpt.dense(others[path]).T).norm())
    return errors


@pytest.mark.parametrize("name", FAMILIES)
def test_the_outputs_of_each_layer_are_closer_than_plain_ones(name: str):
    params = FAMILIES[name]()
    plain = output_errors(params, fgpt.quantize(params))
    errors = output_errors(params, fgpt.quantize_gptq(params, BATCHES))
    assert errors.keys() == plain.keys() != set()
    for path, error in errors.items():
        assert 0 < error < plain[path], path


def test_each_layer_is_quantized_by_what_it_reads_in_the_model_of_the_earlier_ones():
    """Its own codes do not change what it reads: so the inputs may be traced in the result."""
    x, x_quantized = inputs_of_layers(PLAIN, torch.cat(TEXT)), inputs_of_layers(NF4, torch.cat(TEXT))
    others = weight_matrices(NF4)
    for path, w in weight_matrices(PLAIN).items():
        if not path.startswith("blocks."):
            continue
        assert isinstance(w, Tensor)
        y = x_quantized[path]
        moments = Moments(with_damping(y.T @ y, 0.01), (x[path] - y).T @ y)
        expected, result = quantize_by_moments(w, moments, quantize_matrix(w[:1], "nf4"), sweeps=2), others[path]
        assert isinstance(expected, Blockwise4bit)
        assert isinstance(result, Blockwise4bit)
        assert (expected.codes != result.codes).float().mean() < 0.05  # sums in another order
    assert not torch.allclose(x["blocks.0.attn.o"], x_quantized["blocks.0.attn.o"], atol=1e-3)


def test_other_texts_profit_too():
    others = tokens(31, 6, 24, seed=9)
    changes = [
        (fgpt.hidden(params, others) - fgpt.hidden(PLAIN, others)).norm() for params in (NF4, fgpt.quantize(PLAIN))
    ]
    assert changes[0] < 0.8 * changes[1]


def test_padding_is_not_read():
    def with_padding(seed: int) -> fgpt.GPT:
        text = torch.cat([torch.cat(TEXT)[:, :20], tokens(31, 18, 4, seed=seed)], -1)
        weights = torch.arange(24).lt(20).float().expand(18, -1)
        return fgpt.quantize_gptq(PLAIN, [fgpt.Batch(text, text, weights)])

    assert same(with_padding(0), with_padding(1))


def test_packed_documents_are_read_as_such():
    segments = torch.tensor([[1] * 10 + [2] * 14]).expand(6, -1)
    cu_seqlens = torch.tensor([[0, 10, 24]]).expand(6, -1)
    by_segments = [fgpt.Batch(x, x, torch.ones(x.shape), segments=segments) for x in TEXT]
    by_bounds = [fgpt.Batch(x, x, torch.ones(x.shape), cu_seqlens=cu_seqlens) for x in TEXT]
    codes: list[Tensor] = []
    for batches in (by_segments, by_bounds, BATCHES):
        w = fgpt.quantize_gptq(PLAIN, batches, target=r"blocks\.0\.attn\.o").blocks[0].attn.o.w
        assert isinstance(w, Blockwise4bit)
        codes.append(w.codes)
    assert (codes[0] != codes[1]).float().mean() < 0.05 < (codes[0] != codes[2]).float().mean()


# --------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_bitsandbytes_reads_the_same_matrix(format: Any, double_quant: bool):
    frozen = fgpt.quantize_gptq(PLAIN, BATCHES, format, double_quant=double_quant, target=r"blocks\.0\.mlp\..*")
    w = frozen.blocks[0].mlp.up.w
    assert isinstance(w, Blockwise4bit)
    absmax, offset, nested = w.absmax, None, None
    assert isinstance(absmax, Blockwise8bit) == double_quant
    if isinstance(absmax, Blockwise8bit):
        offset, nested = w.offset, QuantState(absmax.absmax, code=absmax.code, blocksize=256, dtype=torch.float32)
        absmax = absmax.codes
    state = QuantState(
        absmax,
        shape=w.shape,
        code=w.code,
        blocksize=64,
        quant_type=format,
        dtype=torch.float32,
        offset=offset,
        state2=nested,
    )
    assert torch.equal(dequantize_4bit(w.codes.view(-1, 1), state), fgpt.dense(w))
    plain = fgpt.quantize(PLAIN, format, double_quant=double_quant, target=r"blocks\.0\.mlp\..*").blocks[0].mlp.up.w
    layouts = [{path: (x.shape, x.dtype) for path, x in leaves(node).items()} for node in (w, plain)]
    assert layouts[0] == layouts[1]


@pytest.mark.parametrize(("format", "rotate"), [("nf4", False), ("int8", False), ("int8", True)])
def test_it_comes_back_from_a_file_bit_for_bit(format: Any, rotate: bool, tmp_path: Path):
    frozen = fgpt.quantize_gptq(PLAIN, BATCHES, format, rotate=rotate)
    fgpt.save(frozen, tmp_path)
    assert same(fgpt.load(tmp_path), frozen)


def test_half_precision_stays_in_the_node():
    half = tree_map(Tensor.bfloat16, PLAIN)
    w = fgpt.quantize_gptq(half, BATCHES, target=r"blocks\.1\.attn\.q").blocks[1].attn.q.w  # pyright: ignore
    assert isinstance(w, Blockwise4bit)
    assert w.dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------- transforms


def test_derivatives_are_those_over_its_numbers():
    numbers, adapters = fgpt.merge(NF4, base="dequantized"), with_noise(fgpt.lora(NF4, fgpt.key(0), 2))

    def gradient(base: fgpt.GPT) -> Any:
        return grad(lambda a: fgpt.loss(fgpt.adapt(base, a), BATCH))

    def per_example(base: fgpt.GPT) -> Any:
        return vmap(grad(lambda a, b: fgpt.loss(fgpt.adapt(base, a), b)), in_dims=(None, 0))(adapters, BATCH)

    along = tree_map(torch.ones_like, adapters)
    close(gradient(NF4)(adapters), gradient(numbers)(adapters), 1e-5)
    close(per_example(NF4), per_example(numbers), 1e-5)
    got, expected = (jvp(gradient(base), (adapters,), (along,))[1] for base in (NF4, numbers))
    close(got, expected, 2e-4, 1e-4)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fgpt.quantize_gptq(PLAIN, []),
            "calibration on 0 positions of text, but blocks.0.mlp.down has 128 inp",
        ),
        (lambda: fgpt.quantize_gptq(tiny(d_model=64, d_mlp=512), BATCHES), "on 432 positions .* has 512 inputs: give"),
        (lambda: fgpt.quantize_gptq(PLAIN, BATCHES, sweeps=-1), "sweeps is -1: expected 0 or more"),
        (lambda: fgpt.quantize_gptq(PLAIN, BATCHES, damping=0.0), "damping is 0: expected a positive fraction"),
        (lambda: fgpt.quantize_gptq(PLAIN, BATCHES, damping=float("nan")), "damping is nan: expected a positive"),
        (lambda: fgpt.quantize_gptq(NF4, BATCHES), r"blocks\.0\.attn\.q is Blockwise4bit already: quantize a plain"),
        (lambda: fgpt.quantize_gptq(tiny(), BATCHES), r"blocks\.0\.attn\.q has rows of 16 elements: nf4 needs"),
        (lambda: fgpt.quantize_gptq(PLAIN, BATCHES, target="wte"), "wte: expected a layer of the blocks; narrow"),
        (lambda: fgpt.quantize_gptq(PLAIN, BATCHES, target="blocks"), "matches no path; nearest are"),
    ],
)
def test_what_cannot_be_quantized_is_named(make: Callable[[], Any], message: str):
    with pytest.raises(fgpt.InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
