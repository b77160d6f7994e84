"""Rematerialized blocks: what they keep, and what they compute again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import close, tiny, tokens, with_noise
from builders.transforms import PACKED, autograd
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fgpt
from fgpt.tree import leaves, tree_map

SERIAL = tiny(d_model=64, d_mlp=128)


PARALLEL = tiny(d_model=64, d_mlp=128, parallel_residual=True, n_norms=1, gated_mlp=True)


LAYERS = r"blocks\..*\.(q|k|v|o|up|gate|down)"


TUNED: dict[str, Callable[[fgpt.GPT], Any]] = {
    "lora": lambda p: fgpt.lora(p, fgpt.key(0), 4, target=LAYERS),
    "lora, q and v": lambda p: fgpt.lora(p, fgpt.key(0), 4, target=r"blocks\..*\.(q|v)"),
    "dora": lambda p: fgpt.dora(p, fgpt.key(0), 4, target=LAYERS),
    "ia3": lambda p: fgpt.ia3(p, rows=LAYERS, cols=LAYERS),
    "biases": lambda p: fgpt.trainable_leaves(p, r".*\.b"),
    "all": fgpt.trainable_leaves,
}


@pytest.mark.parametrize("base", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize("gpt", [SERIAL, PARALLEL], ids=["serial", "parallel"])
def test_a_block_for_its_gradient_alone_has_its_gradient(gpt: fgpt.GPT, name: str, base: Any):
    """What a block adds last is not computed again: `o` too, where it is added beside the MLP."""
    adapters = with_noise(TUNED[name](gpt), seed=1)
    params = gpt if base == "fp32" else fgpt.quantize(gpt, base)
    if base != "fp32":
        adapters = {p: x for p, x in adapters.items() if not p.endswith(".w") or ".ln" in p or "wte" in p}

    def loss(adapters: Any, remat: bool) -> Tensor:
        return fgpt.loss(fgpt.adapt(params, adapters), PACKED, remat)

    got, expected = (autograd(lambda a, r=r: loss(a, r), adapters)[0] for r in (True, False))
    close(got, expected, 1e-6)


@pytest.mark.parametrize("gpt", [SERIAL, PARALLEL], ids=["serial", "parallel"])
def test_what_a_block_adds_last_is_not_computed_again(gpt: fgpt.GPT):
    adapters = fgpt.lora(gpt, fgpt.key(0), 4, target=r"blocks\..*\.(q|k|v)")
    cfg, n = gpt.cfg, PACKED.tokens.numel()

    def flops(fn: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counted:
            fn()
        return counted.get_total_flops()

    def loss(adapters: Any, remat: bool) -> Tensor:
        return fgpt.loss(fgpt.adapt(gpt, adapters), PACKED, remat)

    without, with_recompute = (flops(lambda r=r: autograd(lambda a: loss(a, r), adapters)) for r in (False, True))
    positions = PACKED.loss_positions
    assert positions is not None
    adapted = fgpt.adapt(gpt, adapters)
    forward = flops(lambda: fgpt.hidden_at(adapted, PACKED.tokens, positions, PACKED.segments))
    last = cfg.d_mlp + (cfg.d_model if cfg.parallel_residual else 0)
    num_products = (cfg.n_layer - 1) * n + len(positions)  # of the last block at the positions with a loss alone
    assert with_recompute - without == forward - 2 * num_products * cfg.d_model * last


def saved_bytes(value: Callable[[], Tensor], excluded: list[Tensor]) -> int:
    """Bytes that plain autograd saves for the backward of `value()`, each storage once, without `excluded`."""
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that is freed could lend its address to the next

    def pack(x: Tensor) -> Tensor:
        alive.append(x)
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value()
    for x in excluded:
        sizes.pop(x.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def test_it_saves_a_third_of_the_memory():
    gpt = tiny(n_layer=12, d_model=64, d_mlp=256, n_head=4, n_ctx=64)
    adapters = fgpt.lora(gpt, fgpt.key(0), 8, target=r"blocks\.\d+\.attn\.(q|k|v|o)")
    inputs: Any = tree_map(lambda x: x.detach().requires_grad_(), adapters)
    params = fgpt.adapt(gpt, inputs)
    batch = fgpt.Batch(tokens(31, 2, 64), tokens(31, 2, 64, seed=1), torch.ones(2, 64), torch.ones(2, 64).long())
    inputs_and_base = [*leaves(params).values(), *leaves(batch).values()]
    full, less = (saved_bytes(lambda r=r: fgpt.loss(params, batch, remat=r), inputs_and_base) for r in (False, True))
    stream = 12 * batch.tokens.numel() * 64 * 4
    assert less >= stream  # a block's input is kept: the count counts
    assert less <= 0.35 * full
