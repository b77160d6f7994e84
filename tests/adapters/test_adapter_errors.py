"""What does not fit is named; keys are read and never advanced."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import same, tiny
from builders.adapters import LINEARS

import fgpt
from fgpt.layers import weight_matrices
from fgpt.tree import tree_map

# --------------------------------------------------------------------------------------------- unions and selectors


B = torch.ones(40, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: fgpt.lora(p, fgpt.key(0), target=r"blocks\.\d+\.attn\.c_attn"),
            r"no path; nearest are blocks\.0\.a",
        ),
        (lambda p: fgpt.lora(p, fgpt.key(0), target="(q"), "not a regular expression"),
        (lambda p: fgpt.trainable_leaves(p, r"ln_f\.weight"), r"no path; nearest are .*ln_f\.w"),
        (lambda p: fgpt.lora(p, fgpt.key(0), rank=17), r"rank 17 on blocks\.0\.attn\.q: expected 1 to 16"),
        (lambda p: fgpt.lora(p, fgpt.key(0), rank=0), "rank 0"),
        (
            lambda p: fgpt.adapt(p, fgpt.lora(tiny(d_model=8), fgpt.key(0), 2)),
            r"adapter at blocks\.0\.attn\.q fits a weight of \[8, 8\], but the base has \[16, 16\]",
        ),
        (lambda p: fgpt.adapt(p, {"ln_f.w": torch.ones(8)}), r"ln_f\.w has shape \[8\], but the base has \[16\]"),
        (lambda p: fgpt.adapt(p, {"ln_g.w": torch.ones(16)}), r"no leaf 'ln_g\.w' to replace"),
        (lambda p: fgpt.adapt(p, fgpt.lora(tiny(n_layer=3), fgpt.key(0), 2)), r"no layer 'blocks\.2\.attn\.q'"),
        (
            lambda p: fgpt.adapt(p, fgpt.lora(fgpt.fuse_qkv(p), fgpt.key(0), 2)),
            r"for a fused base: fuse_qkv\(params\) first",
        ),
        (lambda p: fgpt.adapt(fgpt.fuse_qkv(p), fgpt.lora(p, fgpt.key(0), 2)), r"not fused: do not fuse_qkv\(params\)"),
        (lambda p: fgpt.dora(p, fgpt.key(0), rank=17), r"rank 17 on blocks\.0\.attn\.q: expected 1 to 16"),
        (
            lambda p: fgpt.lora(p, fgpt.key(0), dropout=1.0),
            r"dropout 1\.0: expected a probability from 0 to less than 1",
        ),
        (lambda p: fgpt.lora(p, fgpt.key(0), dropout=-0.1), r"dropout -0\.1"),
        (lambda p: fgpt.ia3(p, rows="wte"), "IA3 on wte: expected a linear layer, got Embedding"),
        (lambda p: fgpt.ia3(p, cols="wpe"), "IA3 on wpe: expected a linear layer, got Embedding"),
        (lambda p: fgpt.ia3(p, rows=r".*ln_1"), "no path; nearest are"),
        (
            lambda p: fgpt.adapt(
                p, tree_map(lambda x: x if x.shape[1] == 16 else x[:, :3], fgpt.lora(p, fgpt.key(0), 4))
            ),
            r"adapter at blocks\.0\.attn\.q has A of rank 4, but B of rank 3",
        ),
        (
            lambda p: fgpt.adapt(
                p, {"blocks.0.attn.q": fgpt.DoRA(fgpt.LoRA(torch.ones(2, 16), torch.ones(16, 2), 1.0), torch.ones(8))}
            ),
            r"DoRA at blocks\.0\.attn\.q has 8 magnitudes, but the base has 16 rows",
        ),
        (
            lambda p: fgpt.adapt(
                p, {"blocks.0.mlp.up": fgpt.DoRA(fgpt.LoRA(torch.ones(2, 8), B, 1.0), torch.ones(40))}
            ),
            r"adapter at blocks\.0\.mlp\.up fits a weight of \[40, 8\], but the base has \[40, 16\]",
        ),
        (
            lambda p: fgpt.adapt(p, {"blocks.0.attn.q": fgpt.IA3(row=torch.ones(8))}),
            r"IA3 at blocks\.0\.attn\.q scales 8 components, but the base has 16",
        ),
        (
            lambda p: fgpt.adapt(p, {"blocks.0.mlp.up": fgpt.IA3(torch.ones(40), torch.ones(40))}),
            r"IA3 at blocks\.0\.mlp\.up scales 40 components, but the base has 16",
        ),
        (lambda p: fgpt.adapt(p, {"blocks.0.ln_1": fgpt.IA3(torch.ones(16))}), r"no layer 'blocks\.0\.ln_1' to adapt"),
        (lambda p: fgpt.adapt(p, fgpt.dora(tiny(n_layer=3), fgpt.key(0), 2)), r"no layer 'blocks\.2\.attn\.q'"),
        (
            lambda p: fgpt.merge(p, base="quantized"),
            "merge with base 'quantized': expected \"dequantized\" or a params tree",
        ),
        (lambda p: fgpt.fuse_qkv(fgpt.adapt(p, fgpt.lora(p, fgpt.key(0), 2))), "fuse the plain base"),
        (lambda p: fgpt.save(fgpt.adapt(p, fgpt.lora(p, fgpt.key(0), 2)), Path("x")), r"merge\(params\) first"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[fgpt.GPT], Any], message: str, gpt: fgpt.GPT):
    with pytest.raises(fgpt.InputError, match=message) as caught:
        make(gpt)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- randomness


def test_keys_are_read_and_never_advanced(gpt: fgpt.GPT):
    rng, world = fgpt.key(3), torch.get_rng_state()
    before = rng.get_state()
    fgpt.init(gpt.cfg, rng)
    fgpt.lora(gpt, rng, 2)
    first = fgpt.generate(
        gpt, [[1], [2, 3]], eos_token_id=0, max_new_tokens=8, sampling=fgpt.SamplingParams(temperature=1.0), rng=rng
    )
    assert (
        fgpt.generate(
            gpt, [[1], [2, 3]], eos_token_id=0, max_new_tokens=8, sampling=fgpt.SamplingParams(temperature=1.0), rng=rng
        )
        == first
    )
    assert (
        fgpt.generate(
            gpt,
            [[1], [2, 3]],
            eos_token_id=0,
            max_new_tokens=8,
            sampling=fgpt.SamplingParams(temperature=1.0),
            rng=fgpt.key(4),
        )
        != first
    )
    assert torch.equal(rng.get_state(), before)
    assert torch.equal(torch.get_rng_state(), world)


def test_draws_belong_to_the_key_and_the_path(gpt: fgpt.GPT):
    few: Any = fgpt.lora(gpt, fgpt.key(0), 2, target=r"blocks\..*\.[qkv]")
    more: Any = fgpt.lora(gpt, fgpt.key(0), 2, target=LINEARS)
    assert same(few, {path: more[path] for path in few})  # what else is adapted changes nothing
    other: Any = fgpt.lora(gpt, fgpt.key(1), 2, target=r"blocks\..*\.[qkv]")
    drawn = [x.a for x in more.values() if x.a.shape[1] == 16] + [x.a for x in other.values()]
    assert len({tuple(a.flatten().tolist()) for a in drawn}) == len(drawn)
    assert all(x.a.abs().max() <= 16**-0.5 and x.a.std() > 0.1 for x in few.values())
    assert set(few) == {p for p in weight_matrices(gpt) if re.fullmatch(r"blocks\.\d\.attn\.[qkv]", p)}


def test_adapters_and_params_are_fp32_whatever_the_default_is(gpt: fgpt.GPT):
    torch.set_default_dtype(torch.float64)
    try:
        adapters, params = fgpt.lora(gpt, fgpt.key(0), 2), fgpt.init(gpt.cfg, fgpt.key(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(adapters, fgpt.lora(gpt, fgpt.key(0), 2))
    assert same(params, fgpt.init(gpt.cfg, fgpt.key(0)))
