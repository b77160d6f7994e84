"""What a lifted module does not fit is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import stack_trees
from torch import nn

import fgpt
from fgpt.tree import replace_at


def adapter_pair() -> tuple[Any, Any]:
    return fgpt.from_module(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


def integers() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4))
    module[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    return module


def drop(params: Any) -> Any:
    return fgpt.adapt(params, fgpt.lora(params, fgpt.key(0), 2, target="0", dropout=0.5), rng=fgpt.key(1))


def apply_adapters(change: Callable[[Any], Any]) -> Callable[[], Any]:
    def call() -> Any:
        params, apply = adapter_pair()
        return apply(change(params), torch.ones(2, 4))

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fgpt.from_module(torch.jit.script(nn.Linear(2, 2))),
            r"ordinary nn\.Module, got RecursiveScriptModule",
        ),
        (lambda: fgpt.from_module(nn.LazyLinear(4)), "parameter weight has no shape yet: call the module once"),
        (lambda: fgpt.from_module(integers()), r"parameter 0\.weight is torch\.uint8, expected a floating dtype"),
        (
            lambda: fgpt.from_module(nn.Embedding(4, 2, max_norm=1.0)),
            "the module has max_norm, which changes its table",
        ),
        (lambda: fgpt.from_module(nn.Sequential(nn.EmbeddingBag(4, 2, max_norm=1.0))), "0 has max_norm"),
        (lambda: fgpt.lora(adapter_pair()[0], fgpt.key(0)), r"selector 'blocks.* matches no path; nearest are 0"),
        (lambda: fgpt.lora(adapter_pair()[0], fgpt.key(0), target="1"), "selector '1' matches no path"),
        (lambda: fgpt.lora(adapter_pair()[0], fgpt.key(0), rank=5, target="0"), "rank 5 on 0: expected 1 to 4"),
        (lambda: fgpt.trainable_leaves(adapter_pair()[0], r"0\.weight"), r"matches no path; nearest are .*0\.w"),
        (lambda: fgpt.adapt(adapter_pair()[0], {"0.b": torch.ones(3)}), r"tensor at 0\.b has shape \[3\]"),
        (
            lambda: fgpt.adapt(adapter_pair()[0], {"1": fgpt.IA3(torch.ones(4))}),
            "no layer '1' to adapt; the base has 0",
        ),
        (
            apply_adapters(lambda p: {"0": p["0"]}),
            r"no '1\.weight' in these params: expected a tree of this Sequential",
        ),
        (apply_adapters(lambda p: p | {"2": p["0"]}), r"'2\.w' is not a parameter of this Sequential"),
        (apply_adapters(lambda p: torch.ones(2)), r"no '0\.w' in these params"),
        (
            apply_adapters(lambda p: replace_at(p, {"1.bias": torch.ones(3)})),
            r"1\.bias has shape \[3\], but 1\.bias of the module has \[4\]",
        ),
        (
            apply_adapters(lambda p: stack_trees([p, p])),
            r"0\.w has shape \[2, 4, 4\], but 0\.weight of the module has \[4, 4\]",
        ),
        (
            apply_adapters(lambda p: fgpt.adapt(drop(p), {"0": fgpt.IA3(torch.ones(4))})),
            r"the adapter on 0\.w has dropout, which cannot be merged: adapt without rng",
        ),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], Any], message: str):
    with pytest.raises(fgpt.InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
