"""Learning rates of their own for some leaves: LoRA+ is PEFT's, other patterns are torch's parameter groups."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from builders import close, tiny
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.func import grad, vmap

import fgpt
from fgpt.model import Linear
from fgpt.patterns import first_matches
from fgpt.tree import leaves, tree_map

LORA_PLUS = {r".*/(lora\.b|b|m)": 16.0}
TREE = {"q": torch.ones(2, 3), "k": torch.ones(2, 3), "bias": torch.ones(3)}
GRADS = tree_map(lambda x: torch.randn(x.shape, generator=fgpt.key(0)), TREE)
MAKE: dict[str, Callable[..., fgpt.Optimizer]] = {
    "adamw": fgpt.adamw,
    "adamw8bit": fgpt.adamw8bit,
    "muon": fgpt.muon,
    "schedule-free": fgpt.schedule_free_adamw,
}


@pytest.mark.parametrize("dora", [False, True])
def test_lora_plus_is_pefts(dora: bool):
    """create_loraplus_optimizer over ten steps on one layer: B, and DoRA's magnitude, at 16 times the rate of A."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Linear(12, 9)
        layer = Linear(plain.weight.detach().clone(), plain.bias.detach().clone())
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lin"], use_dora=dora)
        model: Any = peft.get_peft_model(nn.Sequential(OrderedDict(lin=plain)), config)  # pyright: ignore
    decay = 0.0 if dora else 0.1  # theirs decays magnitudes, too
    reference = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0, loraplus_weight_decay=decay, eps=1e-8
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    a, b = (next(p for n, p in trained.items() if part in n).detach().clone() for part in ("lora_A", "lora_B"))
    lora = fgpt.LoRA(a, b, alpha=6.0)
    params: Any = {"layers.lin": fgpt.DoRA(lora, fgpt.weights.row_norms(layer.w, a, b, 2.0)) if dora else lora}
    optimizer = fgpt.adamw(0.01, weight_decay=decay, lr_multipliers=LORA_PLUS)
    state = optimizer.init(params)

    def loss(adapters: Any, x: Any) -> Any:
        adapted = adapters["layers.lin"].adapt_layer(layer, "layers.lin", None)
        return fgpt.linear(x, adapted.w, adapted.b).sin().sum()

    for step in range(10):
        x = torch.randn(4, 12, generator=fgpt.key(step))
        reference.zero_grad()
        model(x).sin().sum().backward()
        reference.step()
        params, state = optimizer.update(grad(loss)(params, x), state, params)
        got = list(leaves(params).values())  # A, B, and the magnitude
        for ours, part in zip(got, ("lora_A", "lora_B", "magnitude")):
            theirs = next(p for name, p in trained.items() if part in name)
            close(ours, theirs.detach().view(ours.shape), 1e-5, 1e-5)
    assert (leaves(params)["layers.lin/lora.b" if dora else "layers.lin/b"]).abs().max() > 0.1


@pytest.mark.parametrize("name", MAKE)
def test_a_multiplier_is_a_rate_of_its_own(name: str):
    """The first pattern that matches counts; a leaf that none matches has the rate itself; 0 freezes."""
    patterns = {"q": 4.0, "q|bias": 0.0}
    make = MAKE[name]
    moved = _twice(make(0.01, weight_decay=0.1, lr_multipliers=patterns))
    alone = {factor: _twice(make(0.01 * factor, weight_decay=0.1)) for factor in (1.0, 4.0)}
    close(moved["k"], alone[1.0]["k"], 1e-6)
    if name != "schedule-free":  # whose average weighs steps by the common rate
        close(moved["q"], alone[4.0]["q"], 1e-6)
    close(moved["bias"], TREE["bias"], 0.0)


def _twice(optimizer: fgpt.Optimizer) -> Any:
    params, state = TREE, optimizer.init(TREE)
    for _ in range(2):
        params, state = optimizer.update(GRADS, state, params)
    return params


def test_a_sweep_over_a_multiplier():
    swept = vmap(lambda x: _twice(fgpt.adamw(0.01, lr_multipliers={"q": x})))(torch.tensor([1.0, 16.0]))
    for i, x in enumerate((1.0, 16.0)):
        close(swept["q"][i], _twice(fgpt.adamw(0.01, lr_multipliers={"q": x}))["q"], 1e-6)


def test_patterns_are_of_whole_paths():
    assert first_matches(["q/a", "q/b", "b"], {"b": 1, r".*b": 2}) == {"q/b": r".*b", "b": "b"}
    adapters = fgpt.lora(tiny(n_layer=1), fgpt.key(0), 2)
    matched = first_matches(list(leaves(adapters)), LORA_PLUS)
    assert matched
    assert all(path.endswith("/b") for path in matched)


@pytest.mark.parametrize(
    ("multipliers", "says"),
    [
        ({"none": 2.0}, "lr_multipliers 'none' matches none of q, k, bias"),
        ({"(": 2.0}, r"lr_multipliers '\(' is not a regular expression"),
        ({"q": -1.0}, "lr_multipliers 'q' is -1.0: expected a number of 0 or more"),
        ({"q": float("nan")}, "lr_multipliers 'q' is nan: expected a number of 0 or more"),
    ],
)
def test_bad_multipliers(multipliers: Any, says: str):
    for make in MAKE.values():
        with pytest.raises(fgpt.InputError, match=says):
            make(0.1, lr_multipliers=multipliers).init(TREE)
