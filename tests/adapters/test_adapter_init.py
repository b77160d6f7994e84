"""Fresh adapters: how many numbers, the base's own outputs, and what one step moves."""

import pytest
import torch
from builders import gpt2_shape, same, tokens
from builders.adapters import BASES, BATCH, FRESH, LINEARS, step_loss

import fgpt
from fgpt.model import Linear
from fgpt.tree import leaves, walk

X, Y = tokens(31, 2, 9), tokens(31, 2, 9, seed=1)


# -------------------------------------------------------------------------------------------------------------- counts


def test_counts():
    small, medium = gpt2_shape(12, 12, 768), gpt2_shape(24, 16, 1024)
    assert fgpt.num_trainable(fgpt.lora(small, fgpt.key(0), 8, target=r"blocks\..*\.attn\.[qkvo]")) == 589_824
    assert fgpt.num_trainable(fgpt.lora(fgpt.fuse_qkv(small), fgpt.key(0), 8, target=r"blocks\..*\.(qkv|o)")) == 442_368
    assert fgpt.num_trainable(fgpt.lora(medium, fgpt.key(0), 4, target=r"blocks\..*\.attn\.(q|v)")) == 393_216
    fused = r"blocks\..*\.(attn\.qkv|attn\.o|mlp\.down)"
    assert fgpt.num_trainable(fgpt.lora(fgpt.fuse_qkv(small), fgpt.key(0), 8, target=fused)) == 811_008
    assert fgpt.num_trainable(fgpt.trainable_leaves(small)) == 124_439_808


# ---------------------------------------------------------------------------------------------- beginning and training


@pytest.mark.parametrize("method", FRESH)
@pytest.mark.parametrize("base", BASES)
def test_at_init_the_adapted_model_is_the_base_bitwise(base: str, method: str):
    params, adapters = BASES[base], FRESH[method](BASES[base])
    logits, adapted = fgpt.apply(params, X), fgpt.adapt(params, adapters)
    assert fgpt.apply(adapted, X).dtype == logits.dtype
    assert torch.equal(fgpt.apply(adapted, X), logits)
    is_adapted = [isinstance(x.w, fgpt.Adapted) for _, x in walk(adapted) if isinstance(x, Linear)]
    assert is_adapted == [True] * len(adapters)
    if base in ("fp32", "bf16"):
        assert same(fgpt.merge(adapted), params)
    else:
        original = BASES["bf16" if "bf16" in base else "fp32"]
        assert same(fgpt.merge(adapted, base=original), original)


def test_a_table_too_is_itself_at_init(gpt: fgpt.GPT):
    for adapters in (fgpt.lora(gpt, fgpt.key(0), 4, target="wte|wpe"), fgpt.dora(gpt, fgpt.key(0), 4, target="wte")):
        assert torch.equal(fgpt.apply(fgpt.adapt(gpt, adapters), X), fgpt.apply(gpt, X))
        assert same(fgpt.merge(fgpt.adapt(gpt, adapters)), gpt)


def test_a_step_moves_every_adapter_and_nothing_else(gpt: fgpt.GPT):
    """With B = 0 the gradient of A is zero, so the first step moves every B and no A; the second moves all."""
    adapters, optimizer = fgpt.lora(gpt, fgpt.key(0), 4, target=LINEARS), fgpt.adamw(1e-2)
    before = {path: x.clone() for path, x in leaves(gpt).items()}
    step = fgpt.make_step(step_loss, optimizer)
    zero = fgpt.init_state(adapters, optimizer)
    one, _ = step(zero, gpt, [BATCH], None)
    two, _ = step(one, gpt, [BATCH], None)
    assert same(before, leaves(gpt))
    old, new, newer = (leaves(state.trainable) for state in (zero, one, two))
    assert [len(x) for x in (old, new, newer)] == [24] * 3
    for path in old:
        assert torch.equal(old[path], new[path]) == path.endswith("/a")
        assert not torch.equal(new[path], newer[path])
