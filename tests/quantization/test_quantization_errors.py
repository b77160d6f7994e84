"""What cannot be quantized is named."""

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import pytest
import torch
from builders import tiny

import fgpt

pytestmark = pytest.mark.usefixtures("exact_derivatives")

PLAIN = tiny(d_model=64, d_mlp=128)


NF4 = fgpt.quantize(PLAIN, "nf4")
ADAPTED = fgpt.adapt(NF4, fgpt.lora(NF4, fgpt.key(0), 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: unwrap(fgpt.quantize)(PLAIN, "nf5"),  # as users run it: here every type is checked first
            "format is 'nf5': expected one of nf4, fp4, int8, blockwise8",
        ),
        (
            lambda: fgpt.quantize(NF4),
            r"blocks\.0\.attn\.q is Blockwise4bit already: quantize a plain params tree, then adapt",
        ),
        (
            lambda: fgpt.quantize(fgpt.adapt(PLAIN, fgpt.lora(PLAIN, fgpt.key(0), 2))),
            r"blocks\.0\.attn\.q is Adapted already: quantize a plain params tree, then adapt it",
        ),
        (lambda: fgpt.quantize(tiny()), r"blocks\.0\.attn\.q has rows of 16 elements: nf4 needs a multiple of 64"),
        (
            lambda: fgpt.quantize(tiny(d_mlp=20), "int8", rotate=True),
            r"blocks\.0\.mlp\.down has rows of 20 elements: a rotation needs a multiple of 8; quantize it without one",
        ),
        (lambda: fgpt.quantize(tiny(), "blockwise8"), "has rows of 16 elements: blockwise8 needs a multiple of 64"),
        (lambda: fgpt.quantize(PLAIN, target=r"blocks\..*\.c_attn"), r"matches no path; nearest are blocks\.\d\.attn"),
        (lambda: fgpt.quantize(PLAIN, target=r".*ln_1"), "matches no path; nearest are"),
        (
            lambda: fgpt.trainable_leaves(NF4),
            r"cannot tune blocks\.0\.attn\.q\.w, which is quantized: narrow the target",
        ),
        (
            lambda: fgpt.trainable_leaves(NF4, r".*\.absmax\.codes"),
            r"cannot tune blocks\.0\.attn\.q\.w, which is quantized",
        ),
        (
            lambda: fgpt.adapt(NF4, {"blocks.0.attn.q.w": torch.ones(64, 64)}),
            r"no leaf 'blocks\.0\.attn\.q\.w' to replace",
        ),
        (lambda: fgpt.lora(NF4, fgpt.key(0), rank=65), r"rank 65 on blocks\.0\.attn\.q: expected 1 to 64"),
        (
            lambda: fgpt.adapt(NF4, {"blocks.0.mlp.up": fgpt.IA3(torch.ones(64))}),
            r"IA3 at blocks\.0\.mlp\.up scales 64 components, but the base has 128",
        ),
        (
            lambda: fgpt.merge(ADAPTED),
            r"blocks\.0\.attn\.q\.w has a quantized base: merge\(params, base=\"dequantized\"\)",
        ),
        (
            lambda: fgpt.merge(ADAPTED, base="original"),
            "merge with base 'original': expected \"dequantized\" or a params tree",
        ),
        (
            lambda: fgpt.merge(ADAPTED, base=tiny()),
            r"blocks\.0\.attn\.q\.w is not in the params given as base, or has another shape there",
        ),
        (
            lambda: fgpt.merge(ADAPTED, base=fgpt.fuse_qkv(PLAIN)),
            r"blocks\.0\.attn\.q\.w is not in the params given as base",
        ),
        (lambda: fgpt.merge(NF4, base=tiny(d_model=64, d_mlp=64)), r"blocks\.0\.mlp\.up\.w is not in the params"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[], Any], message: str):
    with pytest.raises(fgpt.InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
