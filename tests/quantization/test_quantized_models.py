"""A quantized model is the model of its numbers, with adapters and in training."""

from typing import Any

import pytest
import torch
from builders import close, same, tiny, tokens, with_noise
from builders.quantized import FORMATS
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

import fgpt
from fgpt.kernels.quantized_linear import (
    QUANTIZED,
    Blockwise4bit,
    RowwiseInt8,
)
from fgpt.model import Linear
from fgpt.train_step import make_step
from fgpt.tree import astype, leaves, nbytes, replace_at, tree_map, walk

pytestmark = pytest.mark.usefixtures("exact_derivatives")

PLAIN = tiny(d_model=64, d_mlp=128)
X, Y = tokens(31, 2, 9), tokens(31, 2, 9, seed=1)
BATCH = fgpt.Batch(X, Y, torch.ones(2, 9))


# ----------------------------------------------------------------------------------------------------------------- size


def test_a_quantized_model_weighs_what_its_parts_do():
    """The rest of the tree is shared with the original, not copied; a cast leaves codes and scales alone."""
    for kind in FORMATS:
        frozen = fgpt.quantize(PLAIN, kind)
        matrices = [x for _, x in walk(frozen) if isinstance(x, QUANTIZED) and len(x.shape) == 2]
        assert len(matrices) == 12
        assert nbytes(frozen) < 0.4 * nbytes(PLAIN)
        assert frozen.wte.w is PLAIN.wte.w
        short = leaves(astype(frozen, torch.bfloat16))
        for path, x in leaves(frozen).items():
            inside = ".w." in path
            assert torch.equal(short[path], x) if inside else short[path].dtype == torch.bfloat16
            assert short[path].dtype == (x.dtype if inside else torch.bfloat16)


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantized_model_is_the_model_of_its_numbers(kind: Any):
    frozen = fgpt.quantize(PLAIN, kind)
    expected = fgpt.apply(fgpt.merge(frozen, base="dequantized"), X)
    logits = fgpt.apply(frozen, X)
    assert logits.shape == expected.shape
    rounding = (logits - expected).abs().max() / expected.std()
    assert (1e-3 < rounding < 0.2) if kind == "int8" else (rounding < 1e-5)
    assert 1e-3 < (logits - fgpt.apply(PLAIN, X)).abs().mean() / expected.std() < 0.5


@pytest.mark.parametrize(("kind", "rotate"), [*((kind, False) for kind in FORMATS), ("nf4", True), ("int8", True)])
def test_embedding_by_a_quantized_table(kind: Any, rotate: bool):
    """Tied: rows of it, and products with all of it; under vmap too."""
    frozen = fgpt.quantize(PLAIN, kind, rotate=rotate, target="wte|wpe")
    tables = fgpt.merge(frozen, base="dequantized")
    close(fgpt.hidden(frozen, X), fgpt.hidden(tables, X), 1e-6)
    close(fgpt.loss(frozen, BATCH), fgpt.loss(tables, BATCH), 1e-5)
    close(vmap(fgpt.hidden, in_dims=(None, 0))(frozen, X), fgpt.hidden(tables, X), 1e-5)
    assert torch.equal(vmap(lambda r: fgpt.embed(r, frozen.wte.w))(X), fgpt.embed(X, tables.wte.w))
    lora = with_noise(fgpt.lora(frozen, fgpt.key(0), 2, target="wte"))
    close(fgpt.hidden(fgpt.adapt(frozen, lora), X), fgpt.hidden(fgpt.adapt(tables, lora), X), 1e-5)


@pytest.mark.parametrize("method", [fgpt.lora, fgpt.dora])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "blockwise8"])
def test_adapters_over_a_quantized_base_have_the_gradient_over_its_numbers(kind: Any, method: Any):
    frozen = fgpt.quantize(PLAIN, kind)
    plain, adapters = fgpt.merge(frozen, base="dequantized"), with_noise(method(frozen, fgpt.key(0), 2))
    got, expected = (grad(lambda a, p=p: fgpt.loss(fgpt.adapt(p, a), BATCH))(adapters) for p in (frozen, plain))
    close(got, expected, 1e-5)
    rows = fgpt.Batch(X, Y, torch.ones(2, 9))
    got, expected = (
        vmap(grad(lambda a, b, p=p: fgpt.loss(fgpt.adapt(p, a), b)), in_dims=(None, 0))(adapters, rows)
        for p in (frozen, plain)
    )
    close(got, expected, 1e-5)
    along = tree_map(torch.ones_like, adapters)
    got, expected = (
        jvp(grad(lambda a, p=p: fgpt.loss(fgpt.adapt(p, a), BATCH)), (adapters,), (along,))[1] for p in (frozen, plain)
    )
    close(got, expected, 2e-4, 1e-4)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("method", [fgpt.lora, fgpt.dora, lambda p, _: fgpt.ia3(p)], ids=["lora", "dora", "ia3"])
def test_training_leaves_the_frozen_tree_as_it_is_bitwise(kind: Any, method: Any):
    frozen = fgpt.quantize(PLAIN, kind)
    before = {path: x.clone() for path, x in leaves(frozen).items()}
    adapters, optimizer = method(frozen, fgpt.key(0)), fgpt.adamw(3e-2)
    step = make_step(lambda a, p, batch, rng: fgpt.nll(fgpt.adapt(p, a, rng=rng), batch), optimizer)
    state, losses = fgpt.init_state(adapters, optimizer), []
    for i in range(8):
        state, metrics = step(state, frozen, [BATCH], fgpt.fold_in(fgpt.key(0), i))
        losses.append(metrics.loss.item())
    assert same(before, leaves(frozen))
    assert losses[-1] < losses[0] - 0.05
    assert not same(state.trainable, adapters)


# ---------------------------------------------------------------------------------------------------- output difference


def test_output_difference_is_that_of_logits_and_losses():
    zero = fgpt.compare_outputs(PLAIN, PLAIN, BATCH)
    assert (zero.logit.item(), zero.nll.item()) == (0.0, 0.0)
    for after in (fgpt.quantize(PLAIN, "nf4"), astype(PLAIN, torch.bfloat16), with_noise(PLAIN)):
        got = fgpt.compare_outputs(PLAIN, after, BATCH)
        a, b = (fgpt.apply(p, X) for p in (PLAIN, after))
        assert got.logit == max(abs(x - y) for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        mean = [F.cross_entropy(z.flatten(0, 1).float(), Y.flatten()) for z in (a, b)]
        close(got.nll, mean[1] - mean[0], 1e-2 if a.dtype != b.dtype else 1e-5)
        assert got.logit > 1e-3
        assert fgpt.compare_outputs(after, PLAIN, BATCH).logit == got.logit  # whichever way it went
        assert not got.logit.requires_grad


def test_merging_is_measured_by_output_difference():
    """With the values trained on, merging costs only rounding; with those before quantization, its error."""
    frozen = fgpt.quantize(PLAIN, "nf4")
    adapted = fgpt.adapt(frozen, with_noise(fgpt.lora(frozen, fgpt.key(0), 4), 0.02))
    exact = fgpt.compare_outputs(adapted, fgpt.merge(adapted, base="dequantized"), BATCH)
    original = fgpt.compare_outputs(adapted, fgpt.merge(adapted, base=PLAIN), BATCH)
    assert exact.logit < 1e-4
    assert original.logit > 100 * exact.logit


# --------------------------------------------------------------------------------------------------------------- errors


NF4 = fgpt.quantize(PLAIN, "nf4")


def test_narrow_matrices_may_be_int8_and_the_rest_tuned():
    """int8 wants no blocks; a target narrowed past what is quantized tunes."""
    narrow = tiny()
    assert isinstance(fgpt.quantize(narrow, "int8").blocks[0].attn.o.w, RowwiseInt8)
    assert fgpt.num_trainable(fgpt.trainable_leaves(NF4, r".*ln_.*|.*\.b")) > 0
    mixed = fgpt.quantize(fgpt.quantize(PLAIN, "nf4", target=r".*\.mlp\..*"), "int8", target=r".*\.attn\..*")
    assert {type(x.w) for _, x in walk(mixed) if isinstance(x, Linear)} == {Blockwise4bit, RowwiseInt8}
    partly = fgpt.adapt(replace_at(NF4, {"blocks.0.attn.q.w": PLAIN.blocks[0].attn.q.w}), {})  # pyright: ignore
    adapters = with_noise(fgpt.lora(partly, fgpt.key(0), 2, target=r"blocks\.0\.attn\.q"))
    merged = fgpt.merge(fgpt.adapt(partly, adapters))  # nothing adapted is quantized, so nothing has to be said
    assert isinstance(merged.blocks[0].attn.q.w, Tensor)  # pyright: ignore
    assert isinstance(merged.blocks[1].attn.q.w, Blockwise4bit)  # pyright: ignore
