"""Hidden states at some positions alone are those of `hidden`, and so are their gradients."""

from typing import Any

import pytest
import torch
from builders import close, tiny, tokens
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import fgpt
from fgpt.model import fuse_qkv

CONFIGS: dict[str, dict[str, Any]] = {
    "parallel": {"parallel_residual": True},
    "one norm": {"parallel_residual": True, "n_norms": 1, "gated_mlp": True, "rotary_dim": 4},
    "one layer": {"n_layer": 1},
}


def model(name: str) -> fgpt.GPT:
    params = tiny(**CONFIGS.get(name, {}))
    return fuse_qkv(params) if name == "fused" else params


@pytest.mark.parametrize("remat", [False, True], ids=["saved", "remat"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", ["gpt2", "fused", *CONFIGS])
def test_values_and_gradients(name: str, packed: bool, remat: bool):
    params, text = model(name), tokens(31, 2, 9)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9]) if packed else None
    positions = torch.tensor([12, 3, 0, 17])
    direction = torch.randn(4, 16, generator=fgpt.key(1))
    target = r"blocks\.\d\.(attn\.(o|qkv)|mlp\.up)" if name == "fused" else r"blocks\.\d\.(attn\.[qkvo]|mlp\.up)"
    adapters = fgpt.lora(params, fgpt.key(0), rank=2, target=target)

    def at(a: Any) -> torch.Tensor:
        return (direction * fgpt.hidden_at(fgpt.adapt(params, a), text, positions, segments, remat)).sum()

    def everywhere(a: Any) -> torch.Tensor:
        h = fgpt.hidden(fgpt.adapt(params, a), text, segments, remat)
        return (direction * h.flatten(0, -2)[positions]).sum()

    close(at(adapters), everywhere(adapters), 1e-5)
    close(grad(at)(adapters), grad(everywhere)(adapters), 1e-5)


def test_mapped_and_in_forward_mode():
    params, text = tiny(), tokens(31, 3, 7)
    positions = torch.tensor([[1, 6], [0, 2], [5, 4]])
    adapters = fgpt.lora(params, fgpt.key(0), rank=2, target=r".*\.q")

    def at(a: Any, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return fgpt.hidden_at(fgpt.adapt(params, a), row, position).square().sum()

    def everywhere(a: Any, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return fgpt.hidden(fgpt.adapt(params, a), row)[position].square().sum()

    dims = (None, 0, 0)
    close(
        vmap(grad(at), dims)(adapters, text, positions), vmap(grad(everywhere), dims)(adapters, text, positions), 1e-5
    )
    tangent = fgpt.lora(params, fgpt.key(1), rank=2, target=r".*\.q")
    for f in (at, everywhere):
        _, out = jvp(lambda a, f=f: grad(f)(a, text[0], positions[0]), (adapters,), (tangent,))
        if f is at:
            first = out
    close(first, out, 1e-5)


def test_other_positions_of_the_last_block_cost_keys_and_values_alone():
    """Counted products: k and v of every position, and q, o, up and down of the positions that are read."""
    params, text = tiny(n_layer=1), tokens(31, 2, 12)
    positions = torch.tensor([3, 20])
    d, inner, n, m = 16, 40, 24, 2
    with FlopCounterMode(display=False) as all_positions:
        fgpt.hidden(params, text)
    with FlopCounterMode(display=False) as some_positions:
        fgpt.hidden_at(params, text, positions)
    saved = 2 * (n - m) * (2 * d * d + 2 * d * inner)
    assert all_positions.get_total_flops() - some_positions.get_total_flops() == saved
